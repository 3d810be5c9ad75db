"""Messages to ids: the same ids in training and in use, answers ended, long prompts cut in the middle."""

from pico import toy_task

from adapterhub_chat.data.chat_template import encode_prompts
from adapterhub_chat.data.encoding import (
    Encoded,
    encode_answers,
    encode_choices,
    encode_examples,
    messages_of,
    truncate,
)
from adapterhub_chat.types import Example, Message, PromptContract

CONTRACT = PromptContract(template="Say {text}!", system="Be kind.")


def test_a_prompt_is_the_tokenizers_own_chat_format(backbone):
    tokenizer = backbone.tokenizer
    example = Example(
        {"text": "hi"}, "hello", history=(Message("user", "a"), Message("assistant", "b"))
    )
    (prompt,) = encode_prompts(tokenizer, [messages_of(CONTRACT, example)])
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nSay hi!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_training_targets_are_the_answer_and_the_end_token(backbone):
    tokenizer = backbone.tokenizer
    (encoded,) = encode_examples(
        tokenizer, CONTRACT, [Example({"text": "x"}, "good")], max_length=99
    )
    (answer,) = encoded.continuations
    assert tokenizer.decode(answer) == "good<|im_end|>"
    assert (
        encoded.prompt
        == encode_prompts(tokenizer, [messages_of(CONTRACT, Example({"text": "x"}, ""))])[0]
    )


def test_labels_are_taught_by_their_words(backbone):
    task = toy_task()
    example = Example({"text": "x"}, "good")
    (encoded,) = encode_examples(backbone.tokenizer, task.contract, [example], max_length=99)
    assert backbone.tokenizer.decode(encoded.continuations[0]) == "positive<|im_end|>"


def test_choices_stand_in_the_order_of_the_label_set(backbone):
    (encoded,) = encode_choices(
        backbone.tokenizer, toy_task().contract, [Example({"text": "x"}, "")], max_length=99
    )
    words = [backbone.tokenizer.decode(c) for c in encoded.continuations]
    assert words == ["negative", "positive"]


def test_the_end_of_turn_decides_between_labels_that_begin_alike(backbone):
    contract = PromptContract(labels={"a": "good", "b": "goodness"})
    (encoded,) = encode_choices(
        backbone.tokenizer, contract, [Example({"text": "x"}, "")], max_length=99
    )
    end = backbone.tokenizer.eos_token_id
    assert all(c[-1] == end for c in encoded.continuations)


def test_an_example_of_a_mixture_keeps_its_own_contract():
    own = PromptContract(template="Own {text}")
    (message,) = messages_of(CONTRACT, Example({"text": "x"}, "y", contract=own))
    assert message.content == "Own x"


def test_without_a_chat_template_the_turns_are_lines(backbone):
    backbone.tokenizer.chat_template = None
    (prompt,) = encode_prompts(backbone.tokenizer, [[Message("system", "s"), Message("user", "u")]])
    assert backbone.tokenizer.decode(prompt) == "s\nu\n"


def test_long_prompts_lose_their_middle_and_answers_their_end():
    cut = truncate(tuple(range(100)), ((1,) * 50,), 32)
    assert cut.num_inputs == 32
    assert cut.prompt[0] == 0
    assert cut.prompt[-1] == 99
    assert len(cut.continuations[0]) == 16
    short = Encoded((1, 2), ((3,),))
    assert truncate(short.prompt, short.continuations, 32) == short


def test_no_answers_no_ids(backbone):
    assert encode_answers(backbone.tokenizer, []) == []
    assert encode_prompts(backbone.tokenizer, []) == []
