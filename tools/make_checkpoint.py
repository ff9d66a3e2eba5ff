"""Makes a checkpoint of random weights from a transformers configuration, for tests and benchmarks of any size.

    python tools/make_checkpoint.py --config mixtral.json --target /tmp/mixtral --set num_hidden_layers=8 --skew 1.0

``--config`` is a directory with config.json or a JSON file of that kind; nothing is downloaded, and no tokenizer is made.
A list with one entry per layer (``layer_types``) is cut when --set asks for fewer layers. See
``poise.model.random_checkpoint`` for what --skew means and what random weights are not good for.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from poise.errors import CheckpointError, PoiseError, UsageError
from poise.model.random_checkpoint import make_checkpoint


def read_config(path: Path, settings: list[str]) -> Any:
    """The configuration in ``path`` with each ``key=value`` of ``settings`` put in place. Raises UsageError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); give a config.json or its directory") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise CheckpointError(f"{file} names no model_type; give the config.json of a transformers model")
    model_type = values.pop("model_type")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except ValueError:
        raise CheckpointError(
            f"{file} has model_type {model_type!r}, which transformers does not know; choose another"
        ) from None
    values = {config.attribute_map.get(key, key): value for key, value in values.items()}
    changes = dict(parse_setting(setting, config) for setting in settings)
    layers = changes.get("num_hidden_layers")
    if layers is not None and (type(layers) is not int or layers < 1):
        raise UsageError(f"--set num_hidden_layers={layers} is no number of layers; write one of at least 1")
    for key, value in values.items():
        if layers is not None and isinstance(value, list) and len(value) == config.num_hidden_layers:
            values[key] = value[:layers]
    try:
        return AutoConfig.for_model(model_type, **values | changes)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--set {' --set '.join(settings)} makes no configuration: {reason}; change the value"
        ) from None


def parse_setting(setting: str, config: Any) -> tuple[str, Any]:
    """``"hidden_size=64"`` as ``("hidden_size", 64)``; the value is JSON, or else a string."""
    key, separator, text = setting.partition("=")
    known = config.to_dict().keys() | config.attribute_map.keys()
    if not separator or key not in known:
        keys = ", ".join(sorted(known))
        raise UsageError(
            f"--set {setting} names no setting of this configuration; write key=value with a key of {keys}"
        )
    key = config.attribute_map.get(key, key)
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config.json, or a directory that holds one")
    parser.add_argument("--target", type=Path, required=True, help="directory to make")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    parser.add_argument(
        "--skew", type=float, default=0.0, help="exponent of the experts' popularity; 0: as initialised"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    try:
        config = read_config(arguments.config, arguments.set)
        shares = make_checkpoint(
            config, arguments.target, dtype=arguments.dtype, skew=arguments.skew, seed=arguments.seed
        )
    except PoiseError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        sys.exit(2)
    for experts, share_E in shares.items():
        popular = " ".join(f"{share:.2f}" for share in share_E[:4])
        max_over_mean = share_E[0] * len(share_E) / sum(share_E)
        print(f"{experts}: chosen by a share of the tokens {popular} ...; load max/mean {max_over_mean:.2f}")


if __name__ == "__main__":
    main()
