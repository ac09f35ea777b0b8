"""One pass gives the losses of every length and the answers that separate readings would give."""

import numpy as np
import pytest
import torch

from atma.diagnose.probe import Probe
from atma.diagnose.reading import read, read_recent
from atma.diagnose.texts import check_lengths, documents_of_text, lay
from atma.tokenizer import byte_tokenizer

LENGTHS = (128, 200, 300)


def test_a_text_begins_with_end_of_text_and_its_records(documents):
    first, second, _ = lay(byte_tokenizer(), documents, 300, 2, 7)
    assert len(first.tokens) == 301 and first.tokens[0] == 256 and first.head == 1 + 2 * 44
    for record in first.records:
        assert first.tokens[record.place : record.place + 5].tolist() == record.value
        assert first.tokens[record.place - len(record.cue) : record.place].tolist() == record.cue
    assert first.tokens[89:].tolist() == documents.tokens[0, :212].tolist()
    assert first.records != second.records
    assert lay(byte_tokenizer(), documents, 300, 2, 7)[1].records == second.records


def test_losses_are_those_of_the_whole_text(any_model, text):
    found = read(any_model, text, LENGTHS, 77)
    with torch.no_grad():
        hidden, _ = any_model(text.tokens[None, :-1])
        nats = any_model.loss(hidden, text.tokens[None, 1:])[0]
    expected = [float(nats[length // 2 : length].mean()) for length in LENGTHS]
    assert found.losses == pytest.approx(expected, rel=1e-6)  # costs are kept in float32


def test_endings_are_the_same_tokens_with_all_context_and_with_little(any_model, text):
    whole, recent = read(any_model, text, LENGTHS, 77).endings, read_recent(any_model, text, LENGTHS)
    for i, length in enumerate(LENGTHS):
        for found, start in ((whole[i], None), (recent[i], length + 1 - 128)):
            ids = text.tokens[: length + 1]
            ids = ids if start is None else torch.cat([ids[:1], ids[start:]])
            with torch.no_grad():
                hidden, _ = any_model(ids[None, :-1])
                nats = any_model.loss(hidden, ids[None, 1:])[0, -64:]
            assert found == pytest.approx(float(nats.mean()), rel=1e-6)


def test_answers_are_those_of_a_text_that_ends_with_the_question(any_model, text):
    found = read(any_model, text, LENGTHS, 77)
    [record] = text.records
    for i, length in enumerate(LENGTHS):
        whole = torch.cat([text.tokens[:length], torch.tensor(record.cue + record.value)])
        with torch.no_grad():
            hidden, _ = any_model(whole[None, :-1])
            logits = any_model.logits(hidden[0, -5:])
        nats = torch.nn.functional.cross_entropy(logits, whole[-5:])
        assert found.nats[i] == [pytest.approx(float(nats), rel=1e-10)]
        assert found.right[i] == [int((logits.argmax(-1) == whole[-5:]).sum())]


def test_neither_chunks_nor_a_watch_change_what_is_read(any_model, text):
    plain, watched = read(any_model, text, LENGTHS, 1000), read(any_model, text, LENGTHS, 31, Probe(any_model, 64))
    for a, b in zip(plain, watched, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_lengths_need_room_before_and_after(documents):
    texts = lay(byte_tokenizer(), documents, 300, 1, 7)
    check_lengths(texts, (90, 300))
    with pytest.raises(ValueError, match="the first length, 89, must be at least 90: the records take 45 tokens"):
        check_lengths(texts, (89, 300))
    with pytest.raises(ValueError, match="the texts have 300 tokens, less than the length 301"):
        check_lengths(texts, (90, 301))


def test_a_plain_text_is_cut_into_documents():
    found = documents_of_text(byte_tokenizer(), "abcdefghij", 3, 8)
    assert bytes(found.tokens.ravel().tolist()).decode() == "abcdefghi" and found.tokens.shape == (3, 3)
    assert len(documents_of_text(byte_tokenizer(), "abcdefghij", 3, 2).tokens) == 2
    with pytest.raises(ValueError, match="the text has 10 tokens, less than the length 11"):
        documents_of_text(byte_tokenizer(), "abcdefghij", 11, 1)
