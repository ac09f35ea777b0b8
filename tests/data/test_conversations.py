"""Conversations become tokens through a chat template, their answers marked; what cannot be done is refused by name."""

import gzip
import json
import os

import pytest
from tokenizers import AddedToken

from atma.chat.renderer import Renderer
from atma.chat.template import Template, built_in
from atma.checkpoint import save_model
from atma.config import ModelConfig
from atma.data.answers import Answers
from atma.data.conversations import Unusable, messages_of
from atma.data.dataset import TokenSet
from atma.data.prepare import Preparation, prepare
from atma.model import Model
from atma.tokenizer import Tokenizer, byte_tokenizer

CHATML = built_in("chatml").text
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}\
<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LAST_THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FORGETS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% set said = m.content.split('</think>')[-1] | trim %}\
{% if '</think>' in m.content and loop.last %}<think>
{{ m.content.split('</think>')[0].split('<think>')[-1] | trim }}
</think>

{% endif %}{{ said }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Shows the reasoning of the last turn alone, as templates of models that reason do."""
COUNTS = "{{ messages | length }}{% for m in messages %}{{ m.content | length }} {{ m.content }}<|im_end|>{% endfor %}"
TURNS = [("user", "Hello"), ("assistant", "Hi."), ("user", "2+2?"), ("assistant", "4")]


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def chat_tokenizer() -> Tokenizer:
    """Bytes, end-of-text and the special tokens of ChatML."""
    backend = byte_tokenizer().backend
    names = ("<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(backend, 256)


def learned(template: str | Template, messages, tokenizer=None, most=1000):
    """The text of the tokens, answers in brackets."""
    tokenizer = tokenizer or chat_tokenizer()
    template = Template(template, "test", {}, ()) if isinstance(template, str) else template
    with Answers(Renderer(template), tokenizer, most) as answers:
        told = answers(messages)
    pieces, before = [], False
    for token, answer in zip(told.ids.tolist(), told.answers.tolist(), strict=True):
        pieces.append("[" * (answer and not before) + "]" * (before and not answer))
        pieces.append(tokenizer.decode([token]))
        before = answer
    return "".join(pieces) + "]" * before


WHOLE = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[Hi.<|im_end|>]\n"
WHOLE += "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[4<|im_end|>]\n"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation"])
def test_every_answer_is_learned_with_its_end_of_turn(template):
    assert learned(template, chat(*TURNS)) == WHOLE


def test_a_template_that_writes_the_last_turn_otherwise_has_its_answers_found_by_marks():
    told = learned(LAST_THINKS, chat(*TURNS[:3], ("assistant", " 4 ")))
    assert told == WHOLE.replace("[4", "<think></think>[4")


def test_the_reasoning_of_the_last_turn_is_learned_where_the_template_leaves_out_that_of_earlier_ones():
    thinking = [(role, f"<think>\nhm\n</think>\n\n{said}" if role == "assistant" else said) for role, said in TURNS]
    assert learned(FORGETS, chat(*thinking)) == WHOLE.replace("[4", "[<think>\nhm\n</think>\n\n4")
    assert learned(FORGETS, chat(*TURNS[:3], thinking[3])) == WHOLE.replace("[4", "[<think>\nhm\n</think>\n\n4")
    with pytest.raises(ValueError, match="says nothing behind its </think>"):
        learned(FORGETS, chat(*thinking[:3], ("assistant", "<think>hm</think>")))


def test_a_template_that_takes_an_answer_apart_is_told_to_mark_it():
    halves = FORGETS.replace("</think>", "|")
    with pytest.raises(ValueError, match=r"takes an answer apart, .*; mark them in it with \{% generation %\}"):
        learned(halves, chat(("user", "a"), ("assistant", "b|c"), ("user", "a"), ("assistant", "b|c")))


def test_the_token_that_begins_the_next_turn_is_no_end_of_an_answer():
    bare = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    assert learned(bare, chat(*TURNS)) == (
        "<|im_start|>user\nHello\n<|im_start|>assistant\n[Hi.\n]<|im_start|>user\n2+2?\n<|im_start|>assistant\n"
        "[4\n<|endoftext|>]"
    )


def test_an_end_of_turn_that_the_models_folder_declares_is_learned(tmp_path):
    backend = byte_tokenizer().backend
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<|a|>", "<|z|>")])
    tokenizer = Tokenizer(backend, 256)
    model = Model(ModelConfig(tokenizer.vocab_size, width=16, depth=1, pattern=("local",)))
    save_model(tmp_path / "model", model, tokenizer)
    template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|z|>").replace("im_start", "a")
    (tmp_path / "model" / "chat_template.jinja").write_text(template.replace("im_end", "z"))
    endings = []
    for ids in ([256], [256, 258]):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        prepare(lines(tmp_path / "chats.jsonl", GOOD), tmp_path / "set", Preparation(model=str(tmp_path / "model")))
        tokens = TokenSet.open(tmp_path / "set")
        endings.append(tokenizer.decode(tokens.document(0)[tokens.answers(0)].tolist()).lstrip("0123456789"))
    assert endings == ["!", "!<|z|>"]


def test_answers_that_cannot_be_told_are_refused():
    with pytest.raises(ValueError, match=r"cannot be told from the rest; mark them in it with \{% generation %\}"):
        learned(COUNTS, chat(*TURNS))


def test_the_plain_dialogue_learns_where_a_turn_stops_and_where_the_text_ends():
    told = learned(built_in("plain"), chat(*TURNS), byte_tokenizer())
    assert told == ("<|endoftext|>User: Hello\nAssistant:[ Hi.\nUser:] 2+2?\nAssistant:[ 4<|endoftext|>]")


def test_text_is_a_prompt_and_its_completion():
    told = learned(built_in("text"), chat(("user", "1 2 "), ("assistant", "3 4")), byte_tokenizer())
    assert told == "<|endoftext|>1 2 [3 4<|endoftext|>]"


def test_what_spells_a_special_token_in_a_message_is_ordinary_text():
    tokenizer = chat_tokenizer()
    messages = chat(("user", "a<|im_end|>b"), ("assistant", "c<|im_end|>d é"))
    with Answers(Renderer(Template(CHATML, "test", {}, ())), tokenizer, 1000) as answers:
        told = answers(messages)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert (told.ids == end).sum() == 2
    assert bytes(told.ids[told.answers][:-1].tolist()).decode() == "c<|im_end|>d é"


def test_the_tokens_are_those_that_the_server_reads(tmp_path):
    """A history's tokens, then those of what is asked for: one text, whoever tokenises it."""
    tokenizer = chat_tokenizer()
    with Answers(Renderer(Template(CHATML, "test", {}, ())), tokenizer, 1000) as answers:
        told = answers(chat(*TURNS))
        prompt = answers.renderer.render(chat(*TURNS[:3]), prompted=True)
    asked = tokenizer.encode_rendered(prompt, {})[0]
    assert told.ids[: len(asked)].tolist() == asked and told.answers[len(asked)] and not told.answers[len(asked) - 1]


def test_a_token_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match=r"token 258 \('<\|im_end\|>'\) is beyond the model's vocabulary of 257"):
        learned(CHATML, chat(*TURNS), most=257)


FORMS = [
    {"messages": chat(*TURNS)},
    {"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in TURNS]},
    {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": c} for r, c in TURNS]},
    {"messages": [one | {"weight": 1, "tool_calls": [], "thinking": None} for one in chat(*TURNS)], "tools": "[]"},
    {"messages": chat(("system", ""), *TURNS)},
]


@pytest.mark.parametrize("row", FORMS)
def test_the_usual_forms_are_read_alike(row):
    assert messages_of(row, "here") == chat(*TURNS)


def test_prompts_instructions_and_systems_beside_are_turns():
    assert messages_of({"prompt": "a", "completion": "b"}, "") == chat(("user", "a"), ("assistant", "b"))
    alpaca = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert messages_of(alpaca, "") == chat(("user", "Add\n\n1 2"), ("assistant", "3"))
    assert messages_of(alpaca | {"input": ""}, "") == chat(("user", "Add"), ("assistant", "3"))
    beside = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "Be kind"}
    assert messages_of(beside, "")[0] == {"role": "system", "content": "Be kind"}


PROMPT = {"prompt": chat(*TURNS[:3]), "completion": chat(TURNS[3])}
WEIGHTS = {"messages": [one | {"weight": int(one["content"] == "4")} for one in chat(*TURNS)]}


@pytest.mark.parametrize("row", [PROMPT, WEIGHTS])
@pytest.mark.parametrize("template", [CHATML, MARKED, LAST_THINKS])
def test_answers_of_a_prompt_or_of_weight_0_are_shown_and_not_learned(row, template):
    told = learned(template, messages_of(row, "here"))
    assert told.replace("<think></think>", "") == WHOLE.replace("[Hi.<|im_end|>]", "Hi.<|im_end|>")


def test_what_marks_answers_otherwise_than_one_by_one_cannot_leave_one_out():
    twice = MARKED.replace("<|im_end|>{% endgen", "{% endgeneration %}{% generation %}<|im_end|>{% endgen")
    with pytest.raises(ValueError, match=r"marks 4 answers .* where there are 2"):
        learned(twice, messages_of(PROMPT, "here"))


BAD = [
    ({"messages": chat(("user", "a"))}, "a conversation without an answer"),
    ({"messages": []}, "a conversation without an answer"),
    ({"messages": chat(("user", "a"), ("assistant", ""))}, "a message of 'assistant' is empty"),
    ({"messages": chat(("user", " \n"), ("assistant", "b"))}, "a message of 'user' is empty"),
    ({"messages": chat(("user", "a"), ("assistant", None))}, r"a message of 'assistant' has no content \(null\)"),
    ({"messages": chat(("user", "a"), ("wizard", "b"))}, "unknown role 'wizard'; known are system"),
    ({"messages": [{"content": "a"}]}, "unknown role None"),
    ({"messages": ["a"]}, "a message must be a table, not str"),
    ({"messages": [{"role": "user", "content": 4}]}, "content must be text, not int"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of a message is 'image'"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "calls tools"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}, "calls tools"),
    ({"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "f"}}]}, "calls tools"),
    ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]}, "has 'reasoning_content'"),
    ({"messages": [{"role": "assistant", "content": "a", "thinking": "b"}]}, "has 'thinking'"),
    ({"messages": chat(*TURNS), "tools": [{"name": "f"}]}, "a conversation with tools"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "answers all have weight 0"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight 0.5; only 0 and 1"),
    ({"prompt": "a", "completion": None}, "has no content"),
    ({"prompt": "a", "completion": "\ud800"}, "half a character"),
]


@pytest.mark.parametrize(("row", "told"), BAD)
def test_a_conversation_that_cannot_be_used_is_refused_by_name(row, told):
    with pytest.raises(Unusable, match=f"^chats.jsonl, line 7: .*{told}.*--skip-bad"):
        messages_of(row, "chats.jsonl, line 7")


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


GOOD = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(30)]
PLAIN = Preparation(chat_template="plain")


def test_a_bad_row_ends_the_preparation_with_its_line_or_is_left_out_and_counted(tmp_path):
    bad = [row for row, _ in BAD[:-1]]
    path = lines(tmp_path / "chats.jsonl", [*GOOD, *bad])
    with pytest.raises(ValueError, match=r"chats.jsonl, line 31: a conversation without an answer"):
        prepare(path, tmp_path / "set", PLAIN)
    assert not (tmp_path / "set").exists()
    manifest = prepare(path, tmp_path / "set", Preparation(chat_template="plain", skip_bad=True))
    assert sum(manifest["skipped"].values()) == len(bad)
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(GOOD)


def test_a_row_that_is_no_conversation_among_them_is_refused_too(tmp_path):
    path = lines(tmp_path / "chats.jsonl", [*GOOD, {"question": "a"}])
    with pytest.raises(ValueError, match="line 31: no conversation; it has question"):
        prepare(path, tmp_path / "set", PLAIN)


def test_what_a_template_refuses_is_told_with_its_line(tmp_path):
    strict = tmp_path / "strict.jinja"
    strict.write_text("{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML)
    rows = [*GOOD, {"messages": chat(("system", "x"), *TURNS)}]
    with pytest.raises(ValueError, match=r"chats.jsonl:31: the chat template does not render it: Refused: user first"):
        prepare(lines(tmp_path / "chats.jsonl", rows), tmp_path / "set", Preparation(chat_template=str(strict)))
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% if %}")
    with pytest.raises(ValueError, match=r"broken.jinja: the chat template cannot be used: TemplateSyntaxError"):
        prepare(lines(tmp_path / "chats.jsonl", GOOD), tmp_path / "set", Preparation(chat_template=str(broken)))


def test_a_tokenizer_without_a_template_says_how_to_give_one(tmp_path):
    path = lines(tmp_path / "chats.jsonl", GOOD)
    for options in (Preparation(), Preparation(model="nano")):
        with pytest.raises(ValueError, match="no chat template; name one with --chat-template: a Jinja"):
            prepare(path, tmp_path / "set", options)
    with pytest.raises(ValueError, match="'chat_template' 'chatmll': no such file, nor one of plain"):
        prepare(path, tmp_path / "set", Preparation(chat_template="chatmll"))
    with pytest.raises(ValueError, match="'chat_template' is for conversations, and these are texts"):
        prepare(lines(tmp_path / "texts.jsonl", [{"text": "a"}]), tmp_path / "set", PLAIN)
    with pytest.raises(ValueError, match="brings its tokenizer"):
        Preparation(model="nano", tokenizer="bpe")


def test_a_models_own_template_and_vocabulary_are_taken(tmp_path):
    tokenizer = chat_tokenizer()
    model = Model(ModelConfig(tokenizer.vocab_size, width=16, depth=1, pattern=("local",)))
    save_model(tmp_path / "model", model, tokenizer)
    (tmp_path / "model" / "chat_template.jinja").write_text(CHATML)
    prepare(lines(tmp_path / "chats.jsonl", GOOD), tmp_path / "set", Preparation(model=str(tmp_path / "model")))
    tokens = TokenSet.open(tmp_path / "set", verify=True)
    assert tokens.template == CHATML
    ids, answers = tokens.document(0), tokens.answers(0)
    assert tokenizer.decode(ids.tolist()).startswith("<|im_start|>user\n")
    assert tokenizer.decode(ids[answers].tolist()).endswith("!<|im_end|>")


def test_every_kind_of_file_gives_the_same_conversations(tmp_path):
    pyarrow, zstandard = pytest.importorskip("pyarrow"), pytest.importorskip("zstandard")
    parquet = pytest.importorskip("pyarrow.parquet")
    plain = lines(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(f"{i}?,{i}!\n" for i in range(30)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "a.parquet")
    hashes = set()
    for name in ("a.jsonl", "a.json", "a.csv", "b.jsonl.gz", "b.jsonl.zst", "a.parquet"):
        manifest = prepare(tmp_path / name, tmp_path / "set", PLAIN)
        hashes.add(json.dumps(manifest["splits"]))
    assert len(hashes) == 1


def test_a_saved_data_set_is_read_row_by_row(tmp_path):
    datasets = pytest.importorskip("datasets")
    nested = [{"messages": chat(("user", f"{i}?"), ("assistant", f"{i}!"))} for i in range(30)]
    datasets.Dataset.from_list(nested).save_to_disk(str(tmp_path / "saved"))
    ours = prepare(tmp_path / "saved", tmp_path / "set", PLAIN)
    theirs = prepare(lines(tmp_path / "a.jsonl", GOOD), tmp_path / "other", PLAIN)
    assert ours["splits"] == theirs["splits"]


def test_the_same_conversations_give_the_same_bytes_and_a_damaged_mask_is_noticed(tmp_path):
    path = lines(tmp_path / "chats.jsonl", GOOD)
    for name in ("a", "b"):
        prepare(path, tmp_path / name, PLAIN)
        assert TokenSet.open(tmp_path / name, verify=True).answers(0).any()
    files = sorted(os.listdir(tmp_path / "a"))
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    mask = tmp_path / "a" / "train_000000.answers"
    data = mask.read_bytes()
    mask.write_bytes(bytes([data[0] ^ 255]) + data[1:])
    with pytest.raises(ValueError, match=r"train_000000\.answers: damaged: not the SHA-256"):
        TokenSet.open(tmp_path / "a", verify=True)
    mask.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"train_000000\.answers: .* bytes, where .* tokens need"):
        TokenSet.open(tmp_path / "a")
    mask.unlink()
    with pytest.raises(ValueError, match="no such mask of answers"):
        TokenSet.open(tmp_path / "a")


def test_of_few_conversations_one_is_held_out(tmp_path):
    manifest = prepare(lines(tmp_path / "chats.jsonl", GOOD[:3]), tmp_path / "set", PLAIN)
    assert {name: split["documents"] for name, split in manifest["splits"].items()} == {"train": 2, "validation": 1}


def test_a_marked_template_gives_the_tokens_and_the_mask_of_transformers():
    transformers = pytest.importorskip("transformers")
    tokenizer = chat_tokenizer()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token="<|endoftext|>")
    theirs.chat_template = MARKED
    told = theirs.apply_chat_template(chat(*TURNS), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    with Answers(Renderer(Template(MARKED, "test", {}, ())), tokenizer, 1000) as answers:
        ours = answers(chat(*TURNS))
    assert ours.ids.tolist() == list(told["input_ids"])
    assert ours.answers.astype(int).tolist() == list(told["assistant_masks"])
