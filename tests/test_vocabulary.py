"""checkpoints/vocabulary.py: token ids against the original tokenizers, damaged vocabularies, the small world's."""
import base64
import collections
import copy
import json
import pickle
import random
import unicodedata

import pytest

from checkpoint_files import GOLDEN, gguf_bytes, refusal, tiny_gguf, write_folder
from checkpoints import load_pretrained, read_model, save, vocabulary
from checkpoints.encoding import BYTES, byte_pairs
from checkpoints.vocabulary import load_ranks, make_encoding, save_ranks
from golden.make_weights import odd_texts, texts
from model import GPT, GPTConfig


def test_the_texts_are_stored_for_a_port():
    assert GOLDEN["texts"] == texts() and GOLDEN["odd_texts"] == odd_texts()


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
    lacking = [c for c, b in BYTES.items() if b in (0x04, 0x1D, 0xC0, 0xF1, 0xFF)]
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
    (["normalizer"], {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "sentencepiece"),
    (["normalizer"], {"type": "NFKC"}, "normalizer .*NFKC.*only NFC"),
    (["normalizer"], {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}, "Lowercase"),
    (["normalizer"], [], "normalizer"), (["model", "dropout"], 0.1, "dropout=0.1"),
    (["model", "end_of_word_suffix"], "</w>", "end_of_word_suffix"),
    (["added_tokens", 0], {"id": 378, "content": "<|endoftext|>", "lstrip": True}, "lstrip"),
    (["added_tokens", 0], {"id": 378, "content": "<|endoftext|>", "single_word": True}, "single_word"),
    (["pre_tokenizer", "pretokenizers", 0, "behavior"], "MergedWithNext", "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 0, "behavior"], "Removed", "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 1, "use_regex"], True, "pre_tokenizer"),
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


def variant(name):
    """The tokenizer.json of a golden variant: its base with a few entries changed."""
    v = GOLDEN["variants"][name]
    t = {**copy.deepcopy(GOLDEN["tokenizers"][v["base"]]), **v["changes"]}
    t["model"] = {**GOLDEN["tokenizers"][v["base"]]["model"], **v["changes"].get("model", {})}
    return t


def in_folder(folder, t, config=None, size=400):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(t))
    return vocabulary.from_folder(folder, config or {}, size)


@pytest.mark.parametrize("name", sorted(GOLDEN["variants"]))
def test_added_tokens_normalizers_and_whole_words_give_the_original_ids(tmp_path, name):
    encoding = in_folder(tmp_path, variant(name))
    assert encoding.nfc == (name in ("qwen2", "spaces"))
    for e in (encoding, pickle.loads(pickle.dumps(encoding))):
        for text, ids in zip(texts() + odd_texts(), GOLDEN["variants"][name]["ids"], strict=True):
            assert e.encode_ordinary(text) == e.encode(text) == ids, text
            form = (lambda t: unicodedata.normalize("NFC", t)) if encoding.nfc else str
            assert form(e.decode(ids)) == form(text)
            assert [e.encode_single_token(e.decode_single_token_bytes(i)) for i in ids] == ids
    for token in ("<think>", " library") if name in ("qwen2", "words") else ():
        if token.encode() in encoding.by_bytes:
            assert encoding.encode(token + "<|endoftext|>", allowed_special="all")[-1] == encoding.eot_token
            assert len(encoding.encode_ordinary(token)) == 1


def test_whole_words_count_only_where_merges_are_ignored(tmp_path):
    t = variant("words")
    whole, merged = t["model"]["vocab"]["Ġlibrary"], in_folder(tmp_path, GOLDEN["tokenizers"]["llama3"])
    assert in_folder(tmp_path / "a", t).encode_ordinary("the library") == [
        *merged.encode_ordinary("the"), whole]
    t["model"]["ignore_merges"] = False
    encoding = in_folder(tmp_path / "b", t)
    assert encoding.encode_ordinary("the library") == merged.encode_ordinary("the library")
    assert encoding.encode(" library") == merged.encode_ordinary(" library")  # and it is no special token either
    assert encoding.decode([whole]) == " library" and encoding.special_tokens_set == {"<|endoftext|>", "<|im_start|>"}


@pytest.mark.parametrize("settings", [{"bos_token": "<no>"}, {"bos_token": None}, {},
                                      {"bos_token": {"content": "<no>"}}])
def test_a_token_to_put_in_front_of_every_text_must_be_there(tmp_path, settings):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, **settings}))
    with pytest.raises(ValueError, match="tokenizer_config.json: add_bos_token asks for .* is not in the vocabulary"):
        in_folder(tmp_path, GOLDEN["tokenizers"]["gpt2"])
    if not settings.get("bos_token"):
        assert in_folder(tmp_path, GOLDEN["tokenizers"]["llama3"]).bos == 378  # its template names one


@pytest.mark.parametrize("changes", [{"add_bos_token": True}, {"add_bos_token": 1}, {"eos_token_id": "x"},
                                     {"bos_token_id": "x", "add_bos_token": True}, {"pre": "llama-bpe"}])
def test_a_gguf_file_whose_first_or_last_token_is_none_is_refused(tmp_path, changes):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(*tiny_gguf(**{f"tokenizer.ggml.{name}": value for name, value in changes.items()})))
    assert "tokenizer.ggml: add_bos_token is" in refusal(path)


@pytest.mark.parametrize("normalized", [True, False])
def test_an_added_token_is_normalized_where_it_is_looked_for_in_normalized_text(tmp_path, normalized):
    """Ids as the original tokenizer's: written e and accent, it is found in either form, or only as it is written."""
    t = copy.deepcopy(variant("qwen2"))
    t["added_tokens"].append({"id": 382, "content": "e\u0301", "special": False, "normalized": normalized})
    encoding = in_folder(tmp_path, t)
    bytes_of_it = [127, 102]
    assert encoding.encode_ordinary("a\u00e9a") == [64, *([382] if normalized else bytes_of_it), 64]
    assert encoding.encode_ordinary("ae\u0301a") == [64, 382, 64] and encoding.decode([382]) == "e\u0301"


def test_a_special_token_may_strip_its_neighbours(tmp_path):
    """Ordinary text never makes it, so that its flags are of no account there."""
    t = copy.deepcopy(GOLDEN["tokenizers"]["gpt2"])
    t["added_tokens"][1].update(lstrip=True, rstrip=True, single_word=True)
    assert [in_folder(tmp_path, t).encode_ordinary(text) for text in texts()] == GOLDEN["token_ids"]["gpt2"]


def test_an_added_token_is_special_only_if_it_says_so(tmp_path):
    encoding = in_folder(tmp_path, variant("qwen2"))
    assert encoding.special_tokens_set == {"<|endoftext|>", "<|im_start|>"}
    with pytest.raises(ValueError, match="<.im_start.>"):
        encoding.encode("<think><|im_start|>")
    im_start, think = (encoding.encode_single_token(t) for t in ("<|im_start|>", "<think>"))
    assert encoding.encode("<think><|im_start|>", allowed_special={"<|im_start|>"}) == [think, im_start]
    spelled = encoding.encode("<think><|im_start|>", disallowed_special=())
    assert spelled[0] == think and len(spelled) > 3 and encoding.decode(spelled) == "<think><|im_start|>"


@pytest.mark.parametrize("pattern, like", [
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
     r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "llama3"),
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
     "llama3"),
    (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "gpt2")])
def test_other_spellings_of_a_known_split_are_read(tmp_path, pattern, like):
    t = copy.deepcopy(GOLDEN["tokenizers"][like])
    t["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}
    encoding = in_folder(tmp_path, t)
    assert [encoding.encode_ordinary(text) for text in texts()] == GOLDEN["token_ids"][like]


@pytest.mark.parametrize("name", ["gpt2", "smollm", "llama3"])
def test_splits_go_by_several_names_in_gguf_files(name):
    names = {"gpt2": ["gpt-2", "mpt", "olmo", "phi-2"], "smollm": ["smollm", "starcoder", "refact", "minerva-7b"],
             "llama3": ["llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3", "pixtral"]}[name]
    metadata = as_metadata(GOLDEN["tokenizers"][name])
    for pre in names:
        encoding = vocabulary.from_gguf("x.gguf", {**metadata, "tokenizer.ggml.pre": pre}, 400)
        assert [encoding.encode_ordinary(text) for text in texts()] == GOLDEN["token_ids"][name], pre
        like_llama3 = name == "llama3" and pre not in ("smaug-bpe", "dbrx")
        assert encoding.bos == (378 if like_llama3 else None)  # the default of add_bos_token
        for add in (True, False):
            said = {**metadata, "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": add}
            assert vocabulary.from_gguf("x.gguf", said, 400).bos == (378 if add else None)


def as_metadata(t):
    """A tokenizer.json's vocabulary as llama.cpp's converter writes it: types 3 (special), 4 (added), 1 (all else)."""
    vocab = {**t["model"]["vocab"], **{a["content"]: a["id"] for a in t["added_tokens"]}}
    kinds = {a["content"]: 3 if a["special"] else 4 for a in t["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
            "tokenizer.ggml.merges": [" ".join(m) for m in t["model"]["merges"]], "tokenizer.ggml.bos_token_id": 378}


def test_qwen2s_tokenizer_in_a_gguf_file_is_that_of_its_folder():
    t = variant("qwen2")
    encoding = vocabulary.from_gguf("x.gguf", {**as_metadata(t), "tokenizer.ggml.pre": "qwen2"}, 400)
    assert [encoding.encode_ordinary(text) for text in texts() + odd_texts()] == GOLDEN["variants"]["qwen2"]["ids"]
    assert encoding.bos is None
    whole = {**as_metadata(variant("words")), "tokenizer.ggml.pre": "llama-bpe"}
    encoding = vocabulary.from_gguf("x.gguf", whole, 400)
    assert [encoding.encode_ordinary(text) for text in texts() + odd_texts()] == GOLDEN["variants"]["words"]["ids"]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "smollm", "qwen2"])
def test_a_text_of_white_space_is_one_line_and_not_a_crash(tmp_path, name, capfd):
    """tiktoken panics, and prints a backtrace, where its pattern looks ahead over too much white space."""
    encoding = in_folder(tmp_path, variant(name) if name == "qwen2" else GOLDEN["tokenizers"][name])
    for text in (" " * 10 ** 6, "a" + " \n" * 10 ** 6, "\t" * 500_001):
        for encode in (encoding.encode_ordinary, encoding.encode):
            with pytest.raises(ValueError, match="white space"):
                encode(text)
    assert encoding.decode(encoding.encode_ordinary("a" + " " * 499_999 + "b")) == "a" + " " * 499_999 + "b"
    assert encoding.decode(encoding.encode_ordinary("a " * 300_000)) == "a " * 300_000
    assert capfd.readouterr() == ("", "")


def test_ids_beyond_the_vocabulary_are_shown_as_such(tmp_path):
    """The heads of OPT and Qwen are padded: a model may choose an id that no text has."""
    for name in ("opt", "gpt2"):
        encoding = in_folder(tmp_path, GOLDEN["tokenizers"][name], size=400)
        ids = encoding.encode_ordinary("ab")
        assert encoding.decode([*ids, 380, 399]) == "ab<|unused 380|><|unused 399|>"
        assert encoding.decode_tokens_bytes([399]) == [b"<|unused 399|>"]
        with pytest.raises(KeyError):
            encoding.decode([400])
    metadata = as_metadata(GOLDEN["tokenizers"]["gpt2"])
    metadata["tokenizer.ggml.tokens"].append("[PAD380]")
    metadata["tokenizer.ggml.token_type"].append(5)
    encoding = vocabulary.from_gguf("x.gguf", {**metadata, "tokenizer.ggml.pre": "gpt-2"}, 400)
    assert encoding.decode([380, 381]) == "[PAD380]<|unused 381|>" and encoding.n_vocab == 381
    assert 380 not in encoding.encode("[PAD380]")


def test_the_unknown_token_of_a_gguf_file_is_special():
    """Type 2: the token where it is allowed, refused where nothing is said, its letters in ordinary text."""
    metadata = as_metadata(GOLDEN["tokenizers"]["gpt2"])
    metadata["tokenizer.ggml.tokens"].append("[UNK]")
    metadata["tokenizer.ggml.token_type"].append(2)
    encoding = vocabulary.from_gguf("x.gguf", {**metadata, "tokenizer.ggml.pre": "gpt-2"}, 400)
    assert encoding.encode("[UNK]", allowed_special="all") == [380] and encoding.decode([380]) == "[UNK]"
    assert 380 not in encoding.encode_ordinary("[UNK]")
    with pytest.raises(ValueError, match="UNK"):
        encoding.encode("[UNK]")


@pytest.mark.parametrize("has_eot", [True, False])
@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("eos", [None, 9])
def test_what_stands_in_front_of_a_text_where_a_model_has_several_tokens_for_it(tmp_path, has_eot, bos, eos):
    """<|endoftext|>, else what the model expects in front, and what ends a text only where it has neither of these:
    read from a folder, and again from a checkpoint's own text."""
    t = json.dumps(GOLDEN["tokenizers"]["gpt2"])
    t = json.loads(t if has_eot else t.replace("<|endoftext|>", "<|im_end|>"))
    names = {id: token for token, id in t["model"]["vocab"].items()}
    if bos is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": names[bos]}))
    encoding = in_folder(tmp_path, t, {"eos_token_id": eos})
    wanted = t["model"]["vocab"]["<|endoftext|>"] if has_eot else bos if bos is not None else eos
    for e in (encoding, vocabulary.from_json("m", vocabulary.to_json(encoding), 400)):
        assert (e.bos, e.eos) == (bos, eos)
        if wanted is None:
            with pytest.raises(ValueError, match="no token that ends a text"):
                e.eot_token
        else:
            assert e.eot_token == wanted


def test_the_token_that_ends_a_text_comes_from_where_there_is_one(tmp_path):
    t = copy.deepcopy(GOLDEN["tokenizers"]["gpt2"])
    plain = json.loads(json.dumps(t).replace("<|endoftext|>", "<|im_end|>"))
    end, start = (t["model"]["vocab"][token] for token in ("<|endoftext|>", "<|im_start|>"))
    assert in_folder(tmp_path, t).eot_token == end
    for config, token in (({"eos_token_id": 7}, 7), ({"eos_token_id": [8, 7]}, 8)):
        assert in_folder(tmp_path, plain, config).eot_token == token
    with pytest.raises(ValueError, match="tokenizer.json: no token that ends a text"):
        in_folder(tmp_path, plain).eot_token
    for token in ("<|im_start|>", {"content": "<|im_start|>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        for config in ({}, {"eos_token_id": None}, {"eos_token_id": []}):
            assert in_folder(tmp_path, plain, config).eos == in_folder(tmp_path, plain, config).eot_token == start
        assert in_folder(tmp_path, plain, {"eos_token_id": 0}).eos == 0  # the model's own setting comes first
    for wrong in (99999, -1, 400, [400], "2", True, 1.0):
        with pytest.raises(ValueError, match="config.json: eos_token_id .* not one of the model.s tokens, 0 to 399"):
            in_folder(tmp_path, plain, {"eos_token_id": wrong})


def test_merges_txt_with_windows_line_ends_and_a_broken_line(tmp_path):
    t = GOLDEN["tokenizers"]["gpt2"]["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(t["vocab"]))
    (tmp_path / "merges.txt").write_bytes("\r\n".join(["#version: 0.2", *map(" ".join, t["merges"]), ""]).encode())
    encoding = vocabulary.from_folder(tmp_path, {}, 400)
    assert [encoding.encode_ordinary(text) for text in texts()] == GOLDEN["token_ids"]["gpt2"]
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nonly\n")
    with pytest.raises(ValueError, match=r"merges.txt: pair 2 \['only'\]"):
        vocabulary.from_folder(tmp_path, {}, 400)


# ---- the order of merges

def by_the_list(merges, word):
    """BPE as its paper has it, slowly: the pair that stands first in the list, the leftmost of equals, until none."""
    order = {tuple(pair): i for i, pair in reversed(list(enumerate(merges)))}
    parts = list(word)
    while True:
        found = [(order[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in order]
        if not found:
            return parts
        _, i = min(found)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def trained(r):
    """Merges learned from thirty random words."""
    pieces, merges = [r.choices("aab", k=r.randint(2, 9)) for _ in range(30)], []
    for _ in range(12):
        pairs = collections.Counter(pair for parts in pieces for pair in zip(parts, parts[1:]))
        if not pairs:
            break
        left, right = max(sorted(pairs), key=pairs.get)
        merges.append((left, right))
        for parts in pieces:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i:i + 2] = [left + right]
                i += 1
    return merges


def random_merges(r, kind):
    """Merges that are trained, then pruned, shuffled or joined; or with several pairs of a token."""
    merges = trained(r)
    if kind == "pruned":  # and all that is built on what went
        gone = {"".join(merges.pop(r.randrange(len(merges))))}
        for pair in list(merges):
            if set(pair) & gone:
                merges.remove(pair)
                gone.add("".join(pair))
    if kind == "shuffled":
        i = r.randrange(len(merges) - 1)
        merges[i], merges[i + 1] = merges[i + 1], merges[i]
    if kind == "joined":
        merges = list(dict.fromkeys(trained(r) + merges))
    if kind in ("all pairs", "some pairs"):
        tokens, merges = list(dict.fromkeys(left + right for left, right in merges)), []
        known = {"a", "b", *tokens}
        for token in tokens:
            pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if {token[:i], token[i:]} <= known]
            merges += pairs if kind == "all pairs" else r.sample(pairs, r.randint(1, len(pairs)))
    return merges


@pytest.mark.parametrize("kind", ["trained", "all pairs", "pruned", "shuffled", "joined", "some pairs"])
def test_merges_are_refused_or_give_what_their_list_gives(kind):
    r = random.Random(kind)
    accepted = refused = 0
    for _ in range(60):
        merges = random_merges(r, kind)
        tokens = list(dict.fromkeys([*BYTES, *(left + right for left, right in merges)]))
        vocab = {token: i for i, token in enumerate(tokens)}
        words = ["".join(r.choices("ab", k=r.randint(1, 14))) for _ in range(40)]
        try:
            encoding = byte_pairs("x", vocab, merges, vocabulary.GPT2_SPLIT, 400)
        except ValueError as error:
            assert "no training makes" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        accepted += 1
        for word in words:
            assert encoding.encode_ordinary(word) == [vocab[part] for part in by_the_list(merges, word)], (merges, word)
    sound = kind in ("trained", "all pairs", "pruned")
    assert accepted == 60 if sound else accepted > 3 and refused > 3, (accepted, refused)


def test_a_token_that_no_word_reaches_is_refused_unless_words_are_looked_up_whole():
    """tiktoken takes a word that is a token as it stands, before it merges; "aabaa" is a | ab | aa by its merges."""
    merges = [("a", "b"), ("a", "a"), ("b", "aa"), ("aa", "baa")]
    vocab = {token: i for i, token in enumerate([*BYTES, "ab", "aa", "baa", "aabaa"])}
    assert by_the_list(merges, "aabaa") == ["a", "ab", "aa"]
    with pytest.raises(ValueError, match=r"merge 3 .'aa', 'baa'."):
        byte_pairs("x", vocab, merges, vocabulary.GPT2_SPLIT, 400)
    encoding = byte_pairs("x", vocab, merges, vocabulary.GPT2_SPLIT, 400, whole=True)
    assert encoding.encode_ordinary("aabaa") == [vocab["aabaa"]]
    assert encoding.encode_ordinary("aabaab") == [vocab[part] for part in by_the_list(merges, "aabaab")]


def test_what_is_built_on_a_token_made_in_two_ways_is_refused():
    """aab is a | ab or aa | b, whichever comes to be; aa | aab is only one of the ways to aaaab."""
    merges = [tuple(pair.split()) for pair in (
        "a a", "b b", "a b", "a bb", "aa aa", "a ab", "aa b", "aa a", "a aa", "aa bb", "aab b", "a abb", "aa aab",
        "ab aaaa")]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*BYTES, *map("".join, merges)]))}
    with pytest.raises(ValueError, match=r"merge 12 .'aa', 'aab'."):
        byte_pairs("x", vocab, merges, vocabulary.GPT2_SPLIT, 400)


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


# ---- a vocabulary inside a checkpoint of ours

def small_gpt(size):
    return GPT(GPTConfig(vocab_size=size, context=8, n_layer=1, n_head=1, n_embd=4))


@pytest.mark.parametrize("name", [*sorted(GOLDEN["tokenizers"]), *sorted(GOLDEN["variants"]), "small", "lacking"])
def test_a_checkpoint_keeps_its_vocabulary(name, tmp_path):
    if name == "small":
        encoding = make_encoding(RANKS)
    elif name == "lacking":  # bytes, so that characters are passed over
        t = copy.deepcopy(GOLDEN["tokenizers"]["smollm"])
        lacking = [c for c, b in BYTES.items() if b in (0x04, 0xF1)]
        t["model"]["vocab"] = {token: i for i, token in enumerate(k for k in t["model"]["vocab"] if k not in lacking)}
        encoding = in_folder(tmp_path, t)
    else:
        t = variant(name) if name in GOLDEN["variants"] else GOLDEN["tokenizers"][name]
        encoding = in_folder(tmp_path, t, {"eos_token_id": 3})
    save(small_gpt(400), tmp_path / "m.safetensors", encoding)
    save_ranks(RANKS, tmp_path / "tokens.tiktoken")  # one beside it counts only where there is none inside
    _, again = read_model(tmp_path / "m.safetensors")
    for text in (*texts(), *odd_texts(), "a\x04b\U00050000c"):
        ids = encoding.encode_ordinary(text)
        assert again.encode_ordinary(text) == ids and again.decode(ids) == encoding.decode(ids)
        assert again.encode(text + "<|endoftext|>", allowed_special="all") == encoding.encode(
            text + "<|endoftext|>", allowed_special="all")
    assert again.eot_token == encoding.eot_token and again.n_vocab == encoding.n_vocab
    assert [getattr(again, end) for end in ("bos", "eos")] == [getattr(encoding, end, None) for end in ("bos", "eos")]
    assert again.decode([399]) == "<|unused 399|>"


def test_a_damaged_vocabulary_in_a_checkpoint_is_refused_by_name(tmp_path):
    encoding = in_folder(tmp_path, variant("words"))
    good = vocabulary.to_json(encoding)
    f = json.loads(good)
    pair = f["ranks"][0]
    for changes in ({"pattern": "(a+)+$"}, {"pattern": None}, {"ranks": []}, {"ranks": [*f["ranks"], ["AAAA", 7]]},
                    {"ranks": [pair, ["", 300]]}, {"ranks": [["!", 0]]}, {"ranks": 7}, {"special": {"": 379}},
                    {"special": {"x": 5}}, {"special": {"x": 400}}, {"special": {"x": True}},
                    {"others": [["YQ==", -1]]}, {"ids": [[1, 2]]}, {"ids": [[1, 2], [2, 3]]},
                    {"ids": [[399, 398], [398, 399]]}, {"bos": 400},
                    {"eos": "x"}, {"added": [{}]}, {"added": [{"": 3}, {}]}, {"words": {"x": 1}}):
        with pytest.raises(ValueError, match="^file: no usable vocabulary"):
            vocabulary.from_json("file", json.dumps({**f, **changes}), 400)
    with pytest.raises(ValueError, match="beyond the model's"):
        vocabulary.from_json("file", good, encoding.n_vocab - 1)
    r = random.Random(0)
    for _ in range(300):
        raw = bytearray(good.encode())
        for _ in range(r.choice((1, 3))):
            raw[r.randrange(len(raw))] = r.randrange(32, 127)
        text = raw[:r.randrange(len(raw)) if r.random() < 0.2 else len(raw)].decode("utf-8", "replace")
        try:
            vocabulary.from_json("file", text, 400).encode_ordinary("the library")
        except ValueError as error:
            assert str(error).startswith("file: no usable vocabulary") and "\n" not in str(error)
