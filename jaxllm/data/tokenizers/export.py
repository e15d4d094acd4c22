"""Tokenizers of every kind as a `tokenizer.json`, which other libraries read: the same text, the same ids."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.core.errors import DataError
from jaxllm.data.tokenizers.base import Tokenizer, byte_alphabet
from jaxllm.data.tokenizers.beside import Tree


def save_hugging_face(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    start: Sequence[int] = (),
    context: int | None = None,
    chat_templates: Mapping[str, str] = {},
) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers' AutoTokenizer loads them.

    Args:
      start: ids that every text begins with; a `tokenizer.json` that says of itself how texts begin stays as it is.
      context: tokens that the model may see.
      chat_templates: by name; `default` is the model's own.

    Raises:
      DataError: a `tokenizer.json` cannot give the ids of this tokenizer.
    """
    tree = tokenizer_json(tokenizer)
    data = tokenizer.data if tokenizer.spec.kind == "hf" else _json(tree)
    if tree.get("post_processor") is None and start:
        names = {i: token for token, i in tokenizer.special.items()}
        data = _json(tree | {"post_processor": _begins([(names[i], i) for i in start])})
    unknown = tree["model"].get("unk_token")
    config: Tree = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= tokenizer.named() | ({"unk_token": unknown} if unknown else {})
    config |= {"model_max_length": context} if context else {}
    if set(chat_templates) == {"default"}:
        config["chat_template"] = chat_templates["default"]
    elif chat_templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in chat_templates.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(data)
    (folder / "tokenizer_config.json").write_bytes(_json(config))


def _json(tree: Tree) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()


def tokenizer_json(tokenizer: Tokenizer) -> Tree:
    """The `tokenizer.json` that gives the ids of `tokenizer`, added and special tokens included.

    Raises:
      DataError: there is none.
    """
    match tokenizer.spec.kind:
        case "hf":
            return json.loads(tokenizer.data)
        case "byte":
            tree = _byte_pairs({bytes([b]): b for b in range(256)}, [])
        case "tiktoken":
            tree = _of_ranks(tokenizer)
        case "sentencepiece":
            tree = _of_sentencepiece(tokenizer)
    vocab = tree["model"]["vocab"]
    for token, i in sorted((tokenizer.special | tokenizer.added).items(), key=lambda item: item[1]):
        if isinstance(vocab, dict):
            vocab[token] = i  # a model's own vocabulary may have gaps, ids of added tokens alone may not
        tree["added_tokens"].append(_added(token, i, special=token in tokenizer.special))
    return tree


def tree_of(model: Tree, *, normalizer: Tree | None, pre_tokenizer: Tree | None, decoder: Tree | None) -> Tree:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model,
    }  # fmt: skip


def _added(token: str, i: int, *, special: bool) -> Tree:
    sides = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": token, **sides, "special": special}


def _begins(tokens: Sequence[tuple[str, int]]) -> Tree:
    """The post-processor that puts these before every text."""
    first = [{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in tokens]
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    known = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in tokens}
    return {
        "type": "TemplateProcessing", "single": [*first, a], "pair": [*first, a, *first, b], "special_tokens": known
    }  # fmt: skip


def sequence(kind: str, steps: Sequence[Tree]) -> Tree | None:
    """Several normalizers, pretokenizers or decoders (`kind`) as one; None for none."""
    return {"type": "Sequence", kind: list(steps)} if len(steps) > 1 else steps[0] if steps else None


# --- bytes and their pairs -----------------------------------------------------------------------------------------


def byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[str | Sequence[str]],
    *,
    split: Tree | None = None,
    whole: bool = False,
    normalizer: Tree | None = None,
    add_prefix_space: bool = False,
    gpt2: bool = False,
) -> Tree:
    """Byte-level BPE.

    Args:
      split: cuts text into words before bytes are paired; None with `gpt2`: GPT-2's pattern.
      whole: a word that is a token is taken without merging (`ignore_merges`).
    """
    level = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": gpt2}
    model = {"type": "BPE", "vocab": dict(vocab), "merges": list(merges), "ignore_merges": whole}
    steps = [level] if split is None else [split, level]
    return tree_of(model, normalizer=normalizer, pre_tokenizer=sequence("pretokenizers", steps), decoder=level)


def split_by(pattern: str) -> Tree:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_pairs(ids: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]], **form: Any) -> Tree:
    letter = {b: c for c, b in byte_alphabet().items()}
    spelled = lambda token: "".join(letter[b] for b in token)
    return byte_level({spelled(t): i for t, i in ids.items()}, [[*map(spelled, pair)] for pair in merges], **form)


def _of_ranks(tokenizer: Tokenizer) -> Tree:
    from jaxllm.data.tokenizers.ranks import ENCODINGS

    encoding, ranks = ENCODINGS[tokenizer.spec.encoding], tokenizer.ranks
    normalizer = {"type": encoding.normal} if encoding.normal else None
    pairs = merges_of(ranks, ranks.get)
    return _byte_pairs(ranks, pairs, split=split_by(encoding.pattern), whole=True, normalizer=normalizer)


def merges_of(pieces: Iterable[Any], rank: Any) -> list[tuple[Any, Any]]:
    """All pairs of pieces whose union is a piece, in the order in which BPE merges them: by `rank` of the union.

    Args:
      pieces: strings or bytes.
      rank: piece -> a number, lower first; None for what is no piece.
    """
    out = []
    for piece in sorted(pieces, key=rank):
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        found = [(rank(a), rank(b), a, b) for a, b in cuts if rank(a) is not None and rank(b) is not None]
        out += [(a, b) for *_, a, b in sorted(found, key=lambda f: f[:2])]
    return out


# --- SentencePiece -------------------------------------------------------------------------------------------------


def _of_sentencepiece(tokenizer: Tokenizer) -> Tree:
    from sentencepiece import sentencepiece_model_pb2 as proto

    file = proto.ModelProto.FromString(tokenizer.data)
    asked, form = file.trainer_spec, file.normalizer_spec
    unigram, pairs, *_ = proto.TrainerSpec.UNIGRAM, proto.TrainerSpec.BPE
    user = [p.piece for p in file.pieces if p.type == p.USER_DEFINED]
    if asked.model_type not in (unigram, pairs) or asked.treat_whitespace_as_suffix or (
        user and (form.add_dummy_prefix or form.remove_extra_whitespaces)
    ):  # fmt: skip
        what = f"its symbols {user[:3]}" if user else "its kind"
        raise DataError(f"SentencePiece model: {what} cannot be written as a tokenizer.json that gives the same ids")
    space = "\u2581"
    steps = [precompiled(form.precompiled_charsmap)] if form.precompiled_charsmap else []
    if form.remove_extra_whitespaces:
        steps += [replace({"Regex": r"\A +| +\z"}, ""), replace({"Regex": " {2,}"}, " ")]
    steps += [{"type": "Prepend", "prepend": space}] if form.add_dummy_prefix else []
    steps += [replace({"String": " "}, space)]
    decoders = [replace({"String": space}, " ")]
    decoders += [{"type": "ByteFallback"}] if asked.byte_fallback else []
    decoders += [{"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if form.add_dummy_prefix else []
    ids = {p.piece: i for i, p in enumerate(file.pieces)}
    if asked.model_type == unigram:
        vocab = [[p.piece, p.score] for p in file.pieces]
        model = {"type": "Unigram", "unk_id": asked.unk_id, "vocab": vocab, "byte_fallback": asked.byte_fallback}
    else:
        normal = {p.piece: (-p.score, i) for i, p in enumerate(file.pieces) if p.type == p.NORMAL}
        model = {
            "type": "BPE", "unk_token": file.pieces[asked.unk_id].piece, "fuse_unk": True, "vocab": ids,
            "byte_fallback": asked.byte_fallback, "merges": [[*pair] for pair in merges_of(normal, normal.get)],
        }  # fmt: skip
    tree = tree_of(
        model, normalizer=sequence("normalizers", steps), pre_tokenizer=None, decoder=sequence("decoders", decoders)
    )
    tree["added_tokens"] = [_added(token, ids[token], special=False) for token in user]
    return tree


def replace(pattern: Tree, content: str) -> Tree:
    return {"type": "Replace", "pattern": pattern, "content": content}


def precompiled(charsmap: bytes) -> Tree:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
