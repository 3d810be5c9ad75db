"""Smart-home commands by intent in several languages, from the templates of home-assistant-intents."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator

from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task
from adapterhub_chat.types import Example, PromptContract

from ._grammar import Grammar

INTENTS = (
    "HassCancelTimer", "HassClimateGetTemperature", "HassClimateSetTemperature", "HassDecreaseTimer",
    "HassFanSetSpeed", "HassGetState", "HassGetWeather", "HassIncreaseTimer", "HassLightSet",
    "HassMediaNext", "HassMediaPause", "HassMediaPlayerMute", "HassMediaPlayerUnmute", "HassMediaPrevious",
    "HassMediaUnpause", "HassPauseTimer", "HassRespond", "HassSetPosition", "HassSetVolume",
    "HassSetVolumeRelative", "HassStartTimer", "HassTimerStatus", "HassTurnOff", "HassTurnOn",
    "HassUnpauseTimer", "HassVacuumCleanArea",
)  # fmt: skip
"""The intents that have three templates or more in each of the languages."""
COMMANDS = PromptContract(
    system="Which command to a smart home is it?",
    labels={i: re.sub("(?<!^)([A-Z])", r" \1", i.removeprefix("Hass")).lower() for i in INTENTS},
    max_new_tokens=8,
)
NUM_SENTENCES, MAX_DRAWS = 60, 600
"""Sentences of an intent, and the most draws that are made for them."""
SOURCE = "home-assistant-intents==2026.10.27"
LICENCE = "Apache-2.0"

# Names of rooms, devices, floors, timers and list items, and messages: in each language.
_WORDS = {
    "en": (
        "kitchen|bedroom|living room|garage|bathroom|office",
        "desk lamp|ceiling fan|front door|radio|heater|TV|coffee machine",
        "ground floor|first floor|basement|attic",
        "pizza|tea|laundry|eggs",
        "milk|bread|batteries|apples",
        "dinner is ready|we leave at eight|good night",
    ),
    "zh-CN": (
        "厨房|卧室|客厅|车库|浴室|书房",
        "台灯|吊扇|前门|收音机|暖气|电视|咖啡机",
        "一楼|二楼|地下室|阁楼",
        "披萨|泡茶|洗衣|煮蛋",
        "牛奶|面包|电池|苹果",
        "晚饭好了|我们八点出发|晚安",
    ),
    "de": (
        "Küche|Schlafzimmer|Wohnzimmer|Garage|Bad|Büro",
        "Schreibtischlampe|Ventilator|Haustür|Radio|Heizung|Fernseher|Kaffeemaschine",
        "Erdgeschoss|Obergeschoss|Keller|Dachboden",
        "Pizza|Tee|Wäsche|Eier",
        "Milch|Brot|Batterien|Äpfel",
        "das Essen ist fertig|wir gehen um acht|gute Nacht",
    ),
    "fr": (
        "cuisine|chambre|salon|garage|salle de bain|bureau",
        "lampe de bureau|ventilateur|porte d'entrée|radio|chauffage|télé|machine à café",
        "rez-de-chaussée|premier étage|sous-sol|grenier",
        "pizza|thé|lessive|œufs",
        "lait|pain|piles|pommes",
        "le dîner est prêt|on part à huit heures|bonne nuit",
    ),
    "es": (
        "cocina|dormitorio|salón|garaje|baño|despacho",
        "lámpara de mesa|ventilador|puerta principal|radio|calefacción|tele|cafetera",
        "planta baja|primer piso|sótano|ático",
        "pizza|té|colada|huevos",
        "leche|pan|pilas|manzanas",
        "la cena está lista|salimos a las ocho|buenas noches",
    ),
}
_KINDS = (
    ("area", "zone"), ("name",), ("floor",), ("timer_name",), ("todo_list_item", "shopping_list_item"),
    ("message", "timer_command", "search_query"),
)  # fmt: skip


def intents_task(language: str, language_name: str) -> Callable[[], Task]:
    """Return the function `task` of the file of one language, for example ("de", "German")."""
    name = f"intents-{language}"
    key = _PACKAGE_KEYS.get(language, language)

    def task() -> Task:
        """Return the task."""
        return Task(
            name=name,
            contract=COMMANDS,
            metric="accuracy",
            load=lambda: split_examples(commands(key), COMMANDS, source=name),
            language=language,
            about=f"{language_name} commands to a smart home, by intent.",
            licence=LICENCE,
            sources=(SOURCE,),
        )

    return task


def commands(language: str) -> Iterator[Example]:
    """Yield sentences of every intent in a language; those of one template stay in one split.

    `language` is a key of the package: en, zh-CN, de, fr, es. The same sentences every time.
    """
    table = json.loads(
        (data_path("home-assistant-intents") / _FILE.format(language)).read_text("utf-8")
    )
    kinds = zip(_KINDS, _WORDS[language], strict=True)
    words = {name: choices.split("|") for names, choices in kinds for name in names}
    grammar = Grammar(table["expansion_rules"], table["lists"], words)
    for intent in INTENTS:
        templates = [s for block in table["intents"][intent]["data"] for s in block["sentences"]]
        generator = random.Random(f"{language} {intent}")
        template_of: dict[str, str] = {}
        for draw in range(MAX_DRAWS):
            template = templates[draw % len(templates)]
            if draw % len(templates) == 0:
                generator.shuffle(templates)
            template_of.setdefault(grammar.draw(template, generator), template)
            if len(template_of) == NUM_SENTENCES:
                break
        for text, template in template_of.items():
            yield Example({"text": text}, intent, group=template)


_FILE = "home_assistant_intents/data/{}.json"
_PACKAGE_KEYS = {"zh": "zh-CN"}
"""Language -> its key in the package, if they differ."""
