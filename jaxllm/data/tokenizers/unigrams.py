"""SentencePiece files of encoders and encoder-decoders, as `tokenizer.json`: ids are moved as each family moves them.

    T5, mT5          the file's pieces, then <extra_id_99> ... <extra_id_0>: sentinels count from the end
    XLM-R            fairseq's <s> <pad> </s> <unk>, the pieces after the first three, <mask>
    CamemBERT        <s>NOTUSED <pad> </s>NOTUSED <unk> <unk>NOTUSED, the pieces after the first, <mask>
    mBART, mBART-50  as XLM-R, with tokens of languages before <mask>
    PEGASUS          <pad> </s> <mask_1> <mask_2> <unk_2> ... <unk_102>, the pieces after the first two
    ALBERT, XLNet    the file's pieces; without accents and, of ALBERT, capitals; no piece ends in a digit and a comma

Text is normalised by the file's table of characters and split at spaces.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxllm.core.errors import DataError
from jaxllm.data.tokenizers.base import read_model
from jaxllm.data.tokenizers.beside import Beside, Tree, added_token, read_object
from jaxllm.data.tokenizers.export import precompiled, replace, sequence, tree_of

FILES = ("spiece.model", "sentencepiece.bpe.model")

OF_MBART = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX "
    "ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
)
OF_MBART50 = (  # besides those of mBART
    "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN "
    "te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
)


class Form(NamedTuple):
    """How a family has a SentencePiece model."""

    first: tuple[str, ...]  # tokens before the pieces
    skipped: int  # pieces of the file that these stand for
    last: tuple[str, ...]  # tokens after the pieces
    unknown: int | None  # id of what unknown characters become; None: the file's
    before: tuple[str, ...]  # what a text begins with
    after: tuple[str, ...]  # what it ends with
    between: tuple[str, ...] = ()  # what stands between two
    words: bool = True  # text is cut at all spaces, also those that the table of characters leaves
    scores: Mapping[str, float] = {}  # of tokens that are not pieces, where it is not 0
    roles: Mapping[str, str] = {}  # tokens that files may leave unnamed
    named: tuple[str, ...] = ()  # pieces that text may name
    normal: tuple[Tree, ...] = ()  # what is done to text before the file's table of characters
    numbers: bool = True  # a piece may end in a digit and a comma
    second: int = 0  # type of the second text of a pair
    types: Mapping[str, int] = {}  # of tokens that have one of their own


_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
_ROLES = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
_ENDS = {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"}


def _t5(said: Beside) -> Form:
    count = said.config.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= 100_000:
        raise DataError(f"tokenizer_config.json: extra_ids={count!r} must be a number of tokens")
    sentinels = tuple(f"<extra_id_{i}>" for i in reversed(range(count)))
    return Form((), 0, sentinels, None, (), ("</s>",), ("</s>",), roles=_ENDS)


def _xlm_roberta(said: Beside) -> Form:
    return Form(_FAIRSEQ, 3, ("<mask>",), 3, ("<s>",), ("</s>",), ("</s>", "</s>"), roles=_ROLES)


def _camembert(said: Beside) -> Form:
    first = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED")
    scores = {"<unk>NOTUSED": -100.0}
    return _xlm_roberta(said)._replace(first=first, skipped=1, scores=scores)


def _mbart(said: Beside) -> Form:
    after = ("</s>", said.config.get("src_lang") or "en_XX")
    return Form(_FAIRSEQ, 3, (*OF_MBART.split(), "<mask>"), 3, (), after, roles=_ROLES)


def _mbart50(said: Beside) -> Form:
    language = said.config.get("src_lang") or "en_XX"
    tokens = (*OF_MBART.split(), *OF_MBART50.split(), "<mask>")
    return Form(_FAIRSEQ, 3, tokens, 3, (language,), ("</s>",), words=False, roles=_ROLES)


def _pegasus(said: Beside) -> Form:
    offset = said.config.get("offset", 103)
    if type(offset) is not int or not 2 <= offset <= 100_000:
        raise DataError(f"tokenizer_config.json: offset={offset!r} must be how far ids are moved")
    unused = tuple(f"<unk_{i}>" for i in range(2, offset))
    first = ("<pad>", "</s>", "<mask_1>", "<mask_2>", *unused)
    scores, roles = dict.fromkeys(unused, -100.0), _ENDS | {"mask": "<mask_2>"}
    return Form(first, 2, (), len(first), (), ("</s>",), words=False, scores=scores, roles=roles)


def _plain(said: Beside, *, accents: bool, lower: bool) -> tuple[Tree, ...]:
    """Quotes of one kind, no accents unless they are to stay, and, if `lower` or the file beside says so, no capitals."""
    quotes = replace({"String": "``"}, '"'), replace({"String": "''"}, '"')
    without = () if accents else ({"type": "NFKD"}, {"type": "StripAccents"})
    capitals = ({"type": "Lowercase"},) if said.config.get("do_lower_case", lower) else ()
    return *quotes, *without, *capitals


def _albert(said: Beside) -> Form:
    roles = {
        "bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "sep": "[SEP]", "pad": "<pad>", "cls": "[CLS]", "mask": "[MASK]"
    }  # fmt: skip
    return Form(
        (), 0, (), None, ("[CLS]",), ("[SEP]",), ("[SEP]",), roles=roles, named=tuple(roles.values()),
        normal=_plain(said, accents=said.config.get("keep_accents", False), lower=True), numbers=False, second=1,
    )  # fmt: skip


def _xlnet(said: Beside) -> Form:
    roles = {
        "bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "<sep>", "pad": "<pad>", "cls": "<cls>", "mask": "<mask>"
    }  # fmt: skip
    return Form(
        (), 0, (), None, (), ("<sep>", "<cls>"), ("<sep>",), roles=roles, named=(*roles.values(), "<eop>", "<eod>"),
        normal=_plain(said, accents=False, lower=False), numbers=False, second=1, types={"<cls>": 2},
    )  # fmt: skip


# By the class that tokenizer_config.json or config.json names, and by `model_type` of the latter.
CLASSES = {
    "T5": _t5, "MT5": _t5, "XLMRoberta": _xlm_roberta, "Camembert": _camembert, "MBart": _mbart, "MBart50": _mbart50,
    "Pegasus": _pegasus, "Albert": _albert, "XLNet": _xlnet,
}  # fmt: skip
MODEL_TYPES = {
    "t5": _t5, "mt5": _t5, "umt5": _t5, "switch_transformers": _t5, "xlm-roberta": _xlm_roberta,
    "camembert": _camembert, "mbart": _mbart, "pegasus": _pegasus, "albert": _albert, "xlnet": _xlnet,
}  # fmt: skip


def read(path: Path, said: Beside) -> tuple[Tree, Mapping[str, str]]:
    """The tree of a tokenizer.json, and tokens of roles that the files beside it may leave unnamed.

    Raises:
      DataError: not a model of unigrams, or of a family that is not known here.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    form = _form(path, said)
    try:
        file = proto.ModelProto.FromString(read_model(path))
    except DecodeError as e:
        raise DataError(f"{path}: not a SentencePiece model, or a truncated one ({e})") from None
    if file.trainer_spec.model_type != proto.TrainerSpec.UNIGRAM or len(file.pieces) <= form.skipped:
        raise DataError(f"{path}: not a SentencePiece model of unigrams, as those of its family are")
    vocab = [(token, form.scores.get(token, 0.0)) for token in form.first]
    rare = lambda piece: 0 if form.numbers or not (piece[-1:] == "," and piece[-2:-1].isdigit()) else 100
    vocab += [(piece.piece, piece.score - rare(piece.piece)) for piece in file.pieces[form.skipped :]]
    vocab += [(token, 0.0) for token in form.last]
    ids = {token: i for i, (token, _) in enumerate(vocab)}
    if wrong := [token for token in (*form.before, *form.after) if token not in ids]:
        raise DataError(f"{path}: {wrong[0]!r}, which is put around texts, is no token of its vocabulary")
    charsmap = file.normalizer_spec.precompiled_charsmap
    steps = [*form.normal, *([precompiled(charsmap)] if charsmap else [])]
    steps += [] if form.words else [replace({"Regex": " {2,}"}, " ")]
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    unknown = file.trainer_spec.unk_id if form.unknown is None else form.unknown
    fallback = file.trainer_spec.byte_fallback
    model = {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": fallback}
    tree = tree_of(
        model, normalizer=sequence("normalizers", steps),
        decoder=sequence("decoders", [{"type": "ByteFallback"}, spaces]) if fallback else spaces,
        pre_tokenizer=sequence("pretokenizers", [*([{"type": "WhitespaceSplit"}] if form.words else []), spaces]),
    )  # fmt: skip
    tree["added_tokens"] = [
        {"id": ids[token], **added_token(token, special=True)}
        for token in dict.fromkeys((*form.first, *form.last, *form.named))
        if token in ids
    ]
    tree["post_processor"] = _around(form, ids)
    return tree, form.roles


def knows(folder: Path) -> bool:
    """Whether the folder is of a family that is known here."""
    return _maker(read_object(folder / "tokenizer_config.json"), read_object(folder / "config.json"))[0] is not None


def _maker(beside: Tree, config: Tree) -> tuple[Callable[[Beside], Form] | None, str | None]:
    """What makes the form of the family that is named, by class or else by model type; and that class."""
    named = beside.get("tokenizer_class") or config.get("tokenizer_class")
    kind = str(named or "").removesuffix("Fast").removesuffix("Tokenizer")
    return CLASSES.get(kind) if named else MODEL_TYPES.get(str(config.get("model_type"))), named


def _form(path: Path, said: Beside) -> Form:
    config = read_object(path.parent / "config.json")
    made, named = _maker(said.config, config)
    if made is None:
        what = f"of tokenizer_class={named!r}" if named else f"of model_type={config.get('model_type')!r}"
        raise DataError(
            f"{path}: ids of a SentencePiece model {what} are not known here; known: "
            f"{', '.join(CLASSES)}; give a tokenizer.json"
        )
    return made(said)


def _around(form: Form, ids: Mapping[str, int]) -> Tree:
    """The post-processor that puts a family's tokens around texts."""
    special = lambda tokens, kind=0: [
        {"SpecialToken": {"id": token, "type_id": form.types.get(token, kind)}} for token in tokens
    ]
    text = lambda name, kind: [{"Sequence": {"id": name, "type_id": kind}}]
    first = [*special(form.before), *text("A", 0)]
    second = [*special(form.between), *text("B", form.second), *special(form.after, form.second)]
    used: Sequence[str] = sorted({*form.before, *form.between, *form.after})
    return {
        "type": "TemplateProcessing", "single": [*first, *special(form.after)], "pair": [*first, *second],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in used},
    }  # fmt: skip
