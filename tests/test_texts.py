"""Prompts and answers as tokens: what is trained is what generation asks and the template says."""

from __future__ import annotations

import gzip
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from conftest import ROOT, TOKENIZER
from fedpref.data.preferences import Conversation, Preference
from fedpref.errors import UserError
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.models.packed import Layout, Unscored, scored_tokens
from fedpref.models.texts import Texts
from fedpref.tasks.preference import PreferenceLearner, PreferenceTask

DAY = "2024-07-26"
TURN = "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
ASKS = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
EACH = "{% for m in messages %}" + TURN + "{% endfor %}" + ASKS
USER = {"role": "user", "content": "Why is it dark?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def wordy() -> Any:
    """The shipped tokenizer with marks of turns as tokens of their own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    marks = ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


def texts(tokenizer: Any, template: str | None = None, today: str = DAY) -> Texts:
    if template is not None:
        tokenizer.chat_template = template
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=1,
        vocab_size=len(tokenizer),
    )
    return Texts(tokenizer, transformers.LlamaForCausalLM(config), today)


def sentencepiece(hub: bool) -> Any:
    """A tokenizer that marks the beginnings of words, in either layout that such ones have."""
    path = ROOT / "src/fedpref/data/builtin/preferences.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        corpus = [json.loads(line)["prompt"] for line in lines][:300]
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    special += [f"<0x{i:02X}>" for i in range(256)]
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    if hub:
        made.pre_tokenizer = None
    else:
        made.normalizer = normalizers.Sequence([])
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# ---- plain text


@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Human: Where can I go?\n\nAssistant:", " You can go there."),
        ("Where can I go?\n", "You can go there."),
        ("Where can I go? ", "You can go there."),
        ("Where can I g", "o?"),
    ],
)
def test_prompt_and_answer_are_tokenised_together(hub: bool, prompt: str, answer: str) -> None:
    tokenizer = sentencepiece(hub)
    opening, (closed,) = texts(tokenizer).plain(prompt, [answer])
    together = tokenizer(prompt + answer)["input_ids"]
    assert opening + closed == [*together, tokenizer.eos_token_id]
    alone = tokenizer(prompt)["input_ids"]
    assert opening == alone[: len(opening)]  # cut where they part, and nowhere before
    assert len(opening) == len(alone) or together[len(opening)] != alone[len(opening)]


def test_answers_to_a_prompt_share_its_tokens() -> None:
    tokenizer = sentencepiece(False)
    opening, closed = texts(tokenizer).plain("Where can I g", ["o?", " uess?"])
    for ids, answer in zip(closed, ("o?", " uess?"), strict=True):
        assert opening + ids[:-1] == tokenizer("Where can I g" + answer)["input_ids"]


def test_an_opening_token_written_in_the_prompt_is_not_doubled() -> None:
    tokenizer = sentencepiece(True)
    opening, _ = texts(tokenizer).plain("<s>Where?", [" There."])
    assert opening.count(tokenizer.bos_token_id) == 1


def test_a_question_is_read_without_what_the_template_writes_around_it() -> None:
    reader = texts(wordy(), "<|system|>You help.<|end|>" + EACH)
    asked, _ = reader.chat([USER], [[said("The sun set.")]])
    assert reader.question(asked) == USER["content"]
    longer, _ = reader.chat([USER, said("It is night."), USER], [[said("The sun set.")]])
    assert all(part in reader.question(longer) for part in ("You help.", "It is night."))
    plain, _ = reader.plain("Why is it dark?", [" It is night."])
    assert reader.question(plain) == "Why is it dark?"


def test_a_prompt_that_is_only_the_end_token_is_a_prompt() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    opening, (closed,) = texts(tokenizer).plain("<|end|>", ["Once upon a time."])
    assert opening == [tokenizer.eos_token_id]
    assert tokenizer.decode(closed) == "Once upon a time.<|end|>"


def test_an_end_token_that_the_tokenizer_itself_puts_is_no_part_of_the_prompt() -> None:
    tokenizer = sentencepiece(True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    opening, (closed,) = texts(tokenizer).plain("Where can I go?\n", ["There."])
    assert tokenizer.eos_token_id not in opening
    assert closed.count(tokenizer.eos_token_id) == 1


# ---- conversations


def test_a_system_prompt_that_is_lost_once_answered_is_refused() -> None:
    last = (
        "{% set sys = messages | selectattr('role', 'equalto', 'system')"
        " | map(attribute='content') | first | default('') %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|user|>\n' + (sys + '\n' if sys and loop.last else '') }}"
        "{{ m['content'] + '<|end|>\n' }}"
        "{% elif m['role'] == 'assistant' %}" + TURN + "{% endif %}{% endfor %}" + ASKS
    )
    prompt = [{"role": "system", "content": "Answer a child."}, USER]
    with pytest.raises(UserError, match=r"message 1 \(system\) otherwise, or not at all"):
        texts(wordy(), last).chat(prompt, [[said("The sun is away.")], [said("Rotation.")]])


def test_a_system_prompt_that_the_template_never_writes_is_refused() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"leaves out message 1 \(system\)"):
        texts(wordy(), template + ASKS).chat(
            [{"role": "system", "content": "Be short."}, USER], [[said("Yes.")]]
        )


@pytest.mark.parametrize("answers", [["Yes.", "No."], ["<b>Yes</b>", "<i>No</i>"]])
def test_what_only_generation_begins_with_is_warned_of_and_no_part_of_an_answer(
    answers: list[str],
) -> None:
    template = EACH.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
    tokenizer = wordy()
    some = texts(tokenizer, template)
    with pytest.warns(UserWarning, match=r"'<think>\\n', which it leaves out"):
        opening, closed = some.chat([USER], [[said(answer)] for answer in answers])
    assert tokenizer.decode(opening).endswith("<|assistant|>\n")
    assert [tokenizer.decode(ids) for ids in closed] == [f"{a}<|end|>\n" for a in answers]


def test_thoughts_of_an_answer_that_the_template_leaves_out_are_refused() -> None:
    last = "{% set c = m['content'].split('</think>')[-1].lstrip() %}"
    turn = "{{ '<|' + m['role'] + '|>\n' + c + '<|end|>\n' }}"
    cutting = "{% for m in messages %}" + last + turn + "{% endfor %}" + ASKS
    reasoned = said("<think>\ntwo and two\n</think>\n\nFour.")
    with pytest.raises(UserError, match="leaves out what message 2"):
        texts(wordy(), cutting).chat([USER], [[reasoned]])
    # of earlier turns nothing is learned
    opening, _ = texts(wordy(), cutting).chat([USER, reasoned, USER], [[said("Five.")]])
    assert "two and two" not in wordy().decode(opening)
    for kept in (reasoned, said("two and two</think>Four."), said("<think></think>Four.")):
        _, (answer,) = texts(wordy(), EACH).chat([USER], [[kept]])
        assert kept["content"] in wordy().decode(answer)
    texts(wordy(), cutting).chat([USER], [[said("<think>\n</think>Four.")]])


def test_roles_that_the_template_does_not_know_are_refused() -> None:
    with pytest.raises(UserError, match="knows no role 'human'"):
        texts(wordy(), EACH).chat(
            [{"role": "human", "content": "q"}], [[{"role": "gpt", "content": "a"}]]
        )
    named = EACH.replace(TURN, "{% if m['role'] == 'human' %}{% endif %}" + TURN)
    assert texts(wordy(), named).chat([{"role": "human", "content": "q"}], [[said("a")]])


def test_only_the_assistants_turns_of_an_answer_are_scored() -> None:
    tokenizer = wordy()
    answers = [
        [{"role": "user", "content": "thanks"}, said("welcome")],
        [{"role": "user", "content": "wrong"}, said("sorry"), USER, said("Night.")],
    ]
    opening, closed = texts(tokenizer, EACH).chat([USER, said("a")], answers)
    for ids, answer in zip(closed, answers, strict=True):
        whole = tokenizer.apply_chat_template([USER, said("a"), *answer], tokenize=False)
        assert opening + ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
        scored = [token for token in ids if not isinstance(token, Unscored)]
        spoken = [m["content"] for m in answer if m["role"] == "assistant"]
        assert tokenizer.decode(scored) == "".join(f"{text}<|end|>\n" for text in spoken)


def test_tokens_that_are_not_scored_are_read_and_count_for_nothing(tiny: Path) -> None:
    model = LanguageModel(Model(path=str(tiny), dtype="float32"))
    prompt, first, second = (5, 6, 7), (8, 9), (10, 11, 12)
    marked = (*first, *map(Unscored, (20, 21)), *second)
    together = model.log_probabilities(None, [(prompt, (marked,))])
    whole = model.log_probabilities(None, [(prompt, ((*first, 20, 21, *second),))])
    between = model.log_probabilities(None, [((*prompt, *first), ((20, 21),)), (prompt, (first,))])
    torch.testing.assert_close(together, whole - between[:1], atol=1e-4, rtol=0)
    assert scored_tokens(marked) == 5
    with pytest.raises(ValueError, match="none that is scored"):
        Layout.packed([(prompt, ((Unscored(3),),))], torch.device("cpu"))


def test_the_day_is_the_runs_whenever_it_is() -> None:
    template = "Today {{ strftime_now('%d %b %Y') }}\n" + EACH
    written = [
        tokenizer.decode(texts(tokenizer, template, today).chat([USER], [[said("a")]])[0])
        for tokenizer, today in ((wordy(), DAY), (wordy(), DAY), (wordy(), "2025-01-02"))
    ]
    assert written[0] == written[1]
    assert "Today 26 Jul 2024" in written[0]
    assert "Today 02 Jan 2025" in written[2]
    assert date.today().strftime("%d %b %Y") not in written[0]


TOOLS = (
    "{% if tools %}{{ '<|system|>\n' + (tools | tojson) + '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + (m['content'] or '') }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>\n"
    "{% endfor %}" + ASKS
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "here"}}}


def asked(**more: Any) -> tuple[dict[str, Any], ...]:
    return (
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "22 degrees", **more},
    )


def test_tools_and_their_calls_reach_the_template() -> None:
    tokenizer = wordy()
    prompt = Conversation(asked(), {"tools": [WEATHER]})
    opening, _ = texts(tokenizer, TOOLS).chat(prompt, [[said("22.")]])
    read = tokenizer.decode(opening)
    assert '"parameters"' in read
    assert '"arguments"' in read
    assert "22 degrees" in read


def test_tools_that_the_template_does_not_write_are_refused_and_names_warned_of() -> None:
    with pytest.raises(UserError, match="writes no tools, and the row has 1"):
        texts(wordy(), EACH).chat(Conversation([USER], {"tools": [WEATHER]}), [[said("a")]])
    without = TOOLS.replace("m.tool_calls or []", "[]")
    with pytest.raises(UserError, match="leaves out 'tool_calls' of message 2"):
        texts(wordy(), without).chat(asked(), [[said("a")]])
    with pytest.warns(UserWarning, match="does not write 'name'"):
        texts(wordy(), TOOLS).chat(asked(name="weather"), [[said("a")]])


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "answer",
    [
        said("end"),
        said("i"),
        said("assistant"),
        {**said(""), "content": None, "tool_calls": [CALL]},
    ],
)
def test_an_answer_that_stands_elsewhere_too_is_found_where_it_is(answer: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    asks = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.warns(UserWarning, match="before an answer the chat template writes '<think>"):
        opening, (closed,) = texts(tokenizer, asks).chat([USER], [[answer]])
    assert tokenizer.decode(opening).endswith("<|im_start|>assistant\n")
    whole = tokenizer.apply_chat_template([USER, answer], tokenize=False)
    assert opening + closed == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_an_answer_that_ends_with_the_user_is_refused() -> None:
    for answer in ([USER], [said("Yes."), USER]):
        with pytest.raises(UserError, match="ends with a user's turn"):
            texts(wordy(), EACH).chat([USER], [answer])


def test_a_tokenizer_that_opens_with_its_end_token_keeps_one_in_a_prompt() -> None:
    tokenizer = sentencepiece(True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    opening, closed = texts(tokenizer).plain("Hi</s>", [" yes", " no"])
    assert opening.count(2) == 2
    assert all(ids[-1] == 2 for ids in closed)


def test_an_answer_is_closed_once(tiny: Path) -> None:
    tokenizer = sentencepiece(True)
    closing = EACH.replace("<|end|>", "</s>")
    _, (closed,) = texts(tokenizer, closing).chat([USER], [[said("Night.")]])
    assert closed.count(tokenizer.eos_token_id) == 1
    open_ended = EACH.replace("<|end|>", "")
    _, (closed,) = texts(wordy(), open_ended).chat([USER], [[said("Night.")]])
    assert closed[-1] == wordy().eos_token_id


def test_where_the_tokenizer_has_no_end_token_the_models_closes_an_answer() -> None:
    tokenizer = sentencepiece(True)
    tokenizer.eos_token = None
    reader = texts(tokenizer)
    assert reader.stops == [2]
    _, (closed,) = reader.plain("Where can I go?\n", ["There."])
    assert closed[-1] == 2
    reader._generation.eos_token_id = len(tokenizer)  # no token of this tokenizer
    _, (closed,) = reader.plain("Where can I go?\n", ["There."])
    assert tokenizer.decode(closed) == "There."


def test_the_tasks_error_names_the_row(tiny: Path) -> None:
    learner = PreferenceTask(model=Model(path=str(tiny), dtype="float32")).build()
    assert isinstance(learner, PreferenceLearner)
    row = Preference(
        ({"role": "human", "content": "q"},), (said("a"),), (said("b"),), "rows.jsonl, line 3"
    )
    with pytest.raises(UserError, match=r"^rows.jsonl, line 3: the chat template"):
        learner.examples([row])
