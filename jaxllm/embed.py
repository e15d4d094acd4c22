"""The `embed` verb: vectors of texts, in a file, in the terminal or in a notebook."""

import json
import sys
from io import TextIOBase
from pathlib import Path

import numpy as np

from jaxllm.core.errors import ConfigError, DataError
from jaxllm.inference.config import EmbedConfig
from jaxllm.inference.embed import embed
from jaxllm.interop import sentences
from jaxllm.pretrained import load


def run(cfg: EmbedConfig, out: TextIOBase | None = None) -> np.ndarray:
    """A vector of each text, float32 [N, D]; also written to `cfg.out`, or to `out` (None: stdout), a list a line.

    What `cfg` leaves open is as the model's folder says, if it is one of sentence-transformers.

    Raises:
      CheckpointError: no usable model there, or one whose vectors are made in a way that is not known here.
      ConfigError: no texts, or a model without such vectors.
      DataError: a file of texts that cannot be read.
    """
    texts = texts_of(cfg)
    if cfg.out is not None and (Path(cfg.out).suffix != ".npy" or not Path(cfg.out).parent.is_dir()):
        raise ConfigError(f"out={cfg.out}: must be a *.npy file in a folder that is there")
    said = sentences.read(cfg.model)
    found = load(said.folder, cfg.step, cfg.precision)
    if found.source is not None:
        said = sentences.read(found.source)
    if said != sentences.Sentences(said.folder):  # as sentence-transformers does
        texts = [(said.prompt + text).strip() for text in texts]
    texts = [text.lower() for text in texts] if said.lower else texts
    context, longest = found.model.cfg.context, cfg.max_tokens
    if longest is None and said.max_tokens is not None:
        longest = min(said.max_tokens, context)

    def tell(cut: list[int]) -> None:
        print(
            f"{len(cut)} of {len(texts)} texts have more than {longest or context} tokens and were cut: "
            f"{', '.join(map(str, cut[:10]))}{', ...' if len(cut) > 10 else ''}",
            file=sys.stderr,
        )

    vectors_ND = embed(
        found.model, found.tokenizer, texts, start=found.start, end=found.tokenizer.suffix(), pool=cfg.pool or said.pool,
        normalise=said.normalise if cfg.normalise is None else cfg.normalise, max_tokens=longest, batch=cfg.batch,
        cut=tell,
    )  # fmt: skip
    if cfg.out is None:
        for vector_D in vectors_ND:
            print(json.dumps([float(f"{x:.7g}") for x in vector_D]), file=out or sys.stdout)
    else:
        np.save(cfg.out, vectors_ND)
        print(f"{cfg.out}: {len(texts)} vectors of {vectors_ND.shape[1]}", file=out or sys.stdout)
    return vectors_ND


def texts_of(cfg: EmbedConfig) -> list[str]:
    """The texts, then the lines of the file.

    Raises:
      ConfigError: there are none, or one is empty.
      DataError: the file cannot be read.
    """
    texts, places = list(cfg.text), [f"text {n}" for n in range(len(cfg.text))]
    if cfg.file is not None:
        try:
            with Path(cfg.file).open(encoding="utf-8") as f:
                texts += [line.removesuffix("\n") for line in f]
        except OSError as e:
            raise DataError(f"file={cfg.file} cannot be read ({e.strerror})") from None
        except UnicodeDecodeError as e:
            raise DataError(f"file={cfg.file} is not UTF-8 ({e})") from None
    if not texts:
        raise ConfigError("no texts: give some, or a file of them, one a line")
    places += [f"{cfg.file}: line {n + 1}" for n in range(len(texts) - len(places))]
    if empty := [place for place, text in zip(places, texts, strict=True) if not text.strip()]:
        raise ConfigError(f"{empty[0]} is empty: there is nothing to embed; leave it out")
    return texts
