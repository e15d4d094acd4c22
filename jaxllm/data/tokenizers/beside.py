"""What the files beside a tokenizer say of its special tokens and of those added later."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.core.errors import DataError

Tree = dict[str, Any]  # of a JSON file
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")


class Beside:
    """What the files beside a tokenizer say: `config` of tokenizer_config.json, token of each role, added tokens."""

    def __init__(self, folder: Path):
        self.config = read_object(folder / "tokenizer_config.json")
        special = read_object(folder / "special_tokens_map.json")
        self.roles: dict[str, str | None] = {}
        for role in ROLES:
            for tree in (self.config, special):
                if role not in self.roles and f"{role}_token" in tree:
                    self.roles[role] = _content(tree[f"{role}_token"])
        listed = [self.config.get(f"{kind}_special_tokens") or [] for kind in ("additional", "extra")]
        listed.append(special.get("additional_special_tokens") or [])
        self.special = {t for tokens in listed for t in map(_content, tokens) if t}
        self.special |= {token for token in self.roles.values() if token}
        self.added: dict[int, Tree] = {}  # by id, as a tokenizer.json has them
        for token, i in read_object(folder / "added_tokens.json").items():
            if not isinstance(i, int):
                raise DataError(f"{folder}: added_tokens.json: {token!r} has {i!r} for an id")
            self.added[i] = added_token(token, special=token in self.special)
        for i, token in (self.config.get("added_tokens_decoder") or {}).items():
            if not (isinstance(token, Mapping) and i.isdigit() and isinstance(token.get("content"), str)):
                raise DataError(f"{folder}: tokenizer_config.json: added_tokens_decoder[{i!r}] is no token and its id")
            self.added[int(i)] = added_token(**token)

    def role(self, name: str, default: str | None = None) -> str | None:
        return self.roles.get(name, default)


def added_token(content: str, *, special: bool = False, normalized: bool | None = None, **sides: bool) -> Tree:
    """A token as a tokenizer.json has it; `sides` are `lstrip`, `rstrip` and `single_word`."""
    known = {side: bool(sides.get(side)) for side in ("single_word", "lstrip", "rstrip")}
    normalized = not special if normalized is None else normalized
    return {"content": content, "special": special, "normalized": normalized, **known}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token if isinstance(token, str) else None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON ({e}); mend it, or take it away") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: must be an object, got {type(tree).__name__}; mend it, or take it away")
    return tree
