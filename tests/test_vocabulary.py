"""checkpoints/vocabulary.py: token ids against the original tokenizers, damaged vocabularies, the small world's."""
import base64
import copy
import json
import pickle

import pytest

from checkpoint_files import GOLDEN, gguf_bytes, refusal, tiny_gguf, write_folder
from checkpoints import load_pretrained, vocabulary
from checkpoints.vocabulary import load_ranks, make_encoding, save_ranks
from golden.make_weights import texts


@pytest.mark.parametrize("name", sorted(GOLDEN["tokenizers"]))
def test_token_ids_equal_the_original_tokenizers(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizers"][name]))
    encoding = vocabulary.from_folder(tmp_path, {"eos_token_id": [1, 5]}, 400)
    for text, ids in zip(texts(), GOLDEN["token_ids"][name], strict=True):
        assert encoding.encode_ordinary(text) == ids, text
        assert encoding.decode(ids) == text
    assert bool(encoding.ids) == (name == "opt") and encoding.eos == 1
    assert encoding.bos == (378 if name == "llama3" else None)
    end = GOLDEN["tokenizers"][name]["model"]["vocab"].get("<|endoftext|>", 378)
    assert encoding.eot_token == end and encoding.encode("a<|endoftext|>", allowed_special="all")[-1] == end
    assert encoding.n_vocab == 380


def test_mapped_ids_go_through_every_door(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizers"]["opt"]))
    encoding = vocabulary.from_folder(tmp_path, {}, 400)
    page, ids = texts()[0], GOLDEN["token_ids"]["opt"][0]
    for e in (encoding, pickle.loads(pickle.dumps(encoding)), copy.deepcopy(encoding)):
        assert e.encode(page) == e.encode_to_numpy(page).tolist() == ids
        assert e.encode_ordinary_batch([page]) == e.encode_batch([page]) == [ids]
        assert e.decode(ids) == e.decode_batch([ids])[0] == e.decode_with_offsets(ids)[0] == page
        assert e.decode_bytes(ids) == b"".join(e.decode_tokens_bytes(ids)) == page.encode()
        for i in range(380):
            assert e.encode_single_token(e.decode_single_token_bytes(i)) == i


def test_vocab_and_merges_files_say_the_same_as_tokenizer_json(tmp_path):
    t = GOLDEN["tokenizers"]["opt"]["model"]
    vocab = {{"<|endoftext|>": "</s>"}.get(token, token): i for token, i in t["vocab"].items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in t["merges"])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    config = {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoding = vocabulary.from_folder(tmp_path, {}, 400)
    assert [encoding.encode_ordinary(text) for text in texts()] == GOLDEN["token_ids"]["opt"]
    assert encoding.special_tokens_set == {"</s>", "<|im_start|>"}
    assert encoding.bos == encoding.eot_token == encoding.encode_single_token("<|im_start|>")
    (tmp_path / "tokenizer_config.json").unlink()
    encoding = vocabulary.from_folder(tmp_path, {"eos_token_id": vocab["</s>"]}, 400)
    assert encoding.bos is None and encoding.eos == encoding.eot_token == vocab["</s>"]


def test_characters_whose_bytes_a_vocabulary_lacks_are_passed_over(tmp_path):
    t = copy.deepcopy(GOLDEN["tokenizers"]["smollm"])
    lacking = [c for c, b in vocabulary.BYTES.items() if b in (0x04, 0x1D, 0xC0, 0xF1, 0xFF)]
    kept = [token for token in sorted(t["model"]["vocab"], key=t["model"]["vocab"].get) if token not in lacking]
    t["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(t))
    encoding = vocabulary.from_folder(tmp_path, {}, 400)
    assert encoding.decode(encoding.encode_ordinary("a\x04b\U00050000c \x1d!?")) == "abc !?"
    del t["model"]["vocab"]["a"]
    t["model"]["vocab"] = {token: i for i, token in enumerate(t["model"]["vocab"])}
    t["model"]["merges"] = [m for m in t["model"]["merges"] if "a" not in "".join(m)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(t))
    with pytest.raises(ValueError, match="0x61"):
        vocabulary.from_folder(tmp_path, {}, 400)


def change(path, *keys, to):
    """The golden llama3 tokenizer with one entry changed."""
    t = copy.deepcopy(GOLDEN["tokenizers"]["llama3"])
    at = t
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    (path / "tokenizer.json").write_text(json.dumps(t))


@pytest.mark.parametrize("keys, to, says", [
    (["model", "vocab", "a"], 7, "ids"), (["model", "vocab", "a"], 1000, "ids"),
    (["model", "vocab", "new"], 400, "ids"),
    (["model", "vocab", "a"], "7", "integers"), (["model", "vocab", "a"], True, "ids"),
    (["model", "vocab", "a"], -1, "ids"),
    (["model", "merges", 3], ["a"], "merge 3"), (["model", "merges", 3], ["a", "zz"], "merge 3"),
    (["model", "merges", 3], ["a", 1], "pairs"),
    (["model", "merges", 3], ["", "a"], "merge 3"), (["model", "merges"], {}, "BPE"),
    (["model", "byte_fallback"], True, "tokenizer=False"),
    (["normalizer"], {"type": "NFC"}, "tokenizer=False"),
    (["pre_tokenizer"], {"type": "Metaspace"}, "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], "(a+)+$", "pre_tokenizer"),
    (["pre_tokenizer"], None, "pre_tokenizer"),
    (["added_tokens", 0, "id"], 3, "ids"), (["added_tokens", 0, "content"], "a", "two ids"),
    (["added_tokens"], [1], "added_tokens"),
    (["added_tokens", 0, "content"], "", "special"), (["added_tokens", 0, "content"], "\ud800", "special"),
    (["model"], None, "BPE"), (["post_processor"], {"processors": 5}, None), (["post_processor"], [1], None),
])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path, keys, to, says):
    change(tmp_path, *keys, to=to)
    if says is None:  # no business of ours
        assert vocabulary.from_folder(tmp_path, {}, 400).bos is None
        return
    with pytest.raises(ValueError, match=says) as caught:
        vocabulary.from_folder(tmp_path, {}, 400)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


def test_sentencepiece_is_refused_and_the_weights_still_load(tmp_path):
    folder = write_folder(tmp_path / "m", "llama")
    (folder / "tokenizer.model").write_bytes(b"\n\x0e")
    assert "tokenizer=False" in refusal(folder)
    assert load_pretrained(folder, tokenizer=False)[1] is None
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(*tiny_gguf(**{"tokenizer.ggml.model": "llama"})))
    assert "tokenizer=False" in refusal(path)
    assert load_pretrained(path, tokenizer=False)[1] is None


# ---- the small world's ranks

RANKS = {**{bytes([b]): b for b in range(256)}, b"ab": 256, b" a": 257, b" ab": 258}


def test_ranks_are_saved_whole_and_read_back(tmp_path):
    path = tmp_path / "ranks"
    save_ranks(RANKS, path)
    assert load_ranks(path) == RANKS and [p.name for p in tmp_path.iterdir()] == ["ranks"]
    assert make_encoding(RANKS).encode_ordinary("ab ab12") == [256, 258, *b"12"]
    assert path.read_bytes().splitlines()[97] == b"YQ== 97"  # base64 of "a", as tiktoken's own files have it


GOOD = [b"%s %d" % (base64.b64encode(bytes([b])), b) for b in range(256)]


@pytest.mark.parametrize("lines, names", [
    ([], "0 tokens"), (GOOD[:-1], "255 tokens"), (GOOD[:7] + [b"YQ=="] + GOOD[8:], "line 8"),
    (GOOD + [b"!!! 256"], "line 257"),
    (GOOD + [b"YWE= x"], "line 257"), (GOOD + [b"YWE= 257"], "257 tokens"), (GOOD + [b"YQ== 256"], "256 tokens"),
    (GOOD + [b""], "line 257"), ([b"\x80\x04\x95garbage"], "line 1"),
    ([b"%s %d" % (base64.b64encode(bytes([1, b])), b) for b in range(256)], "ranks.*byte")])
def test_damaged_ranks_are_refused(tmp_path, lines, names):
    path = tmp_path / "ranks"
    path.write_bytes(b"\n".join(lines) + b"\n" if lines else b"")
    with pytest.raises(ValueError, match=names):
        load_ranks(path)
