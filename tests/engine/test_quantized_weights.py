"""Checkpoints that transformers' quantizers load: what is computed with them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from duopool.core.config import CacheConfig, ModelConfig
from duopool.core.errors import UnsupportedModel
from duopool.engine import model_loader
from duopool.engine.checked_model import CheckedModel
from duopool.engine.fused_model import FusedModel
from duopool.engine.model_loader import adopt, load_model
from duopool.engine.probe import check_parity, eager_logits
from duopool.engine.quantized_weights import has_plain_layers, restore
from duopool.kernels.cpu_library import library

CPU = library()
needs_fusion = pytest.mark.skipif(
    CPU is None or CPU.torch_has_bfloat16_tiles, reason="this machine goes layer by layer"
)
BLOCK_SIZE = 4
BLOCK = 32
"""Rows and columns that share a scale in the FP8 checkpoint."""


def plain(folder: Path) -> Path:
    """A model whose widths every quantizer takes."""
    config: Any = FAMILIES["llama"]()
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    module: Any = make(config, dtype=torch.bfloat16)
    module.save_pretrained(folder)
    return folder


def say(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def fp8(folder: Path) -> None:
    """As DeepSeek publishes: a scale per square of the weight."""

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, weight in weights.items():
            if "proj" not in name:
                found[name] = weight
                continue
            squares = weight.float().unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
            scales = squares.abs().amax((1, 3)) / 448
            found[name] = (squares / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scales
        return found

    rewrite(plain(folder), change)
    say(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]})


def compressed_tensors(folder: Path) -> None:
    """As llm-compressor publishes: 4 bits in groups, packed into words."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    module = AutoModelForCausalLM.from_pretrained(plain(folder))
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": BLOCK},
    }
    settings = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(module, settings)
    for layer in module.modules():
        if hasattr(layer, "quantization_scheme"):
            groups = layer.weight.detach().unflatten(-1, (-1, BLOCK))
            scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), layer.quantization_scheme.weights)
            layer.weight_scale.data.copy_(scales)
            layer.weight_zero_point.data.copy_(zeros)
    compressor = ModelCompressor.from_pretrained_model(module, "pack-quantized")
    compressor.compress_model(module)
    module.save_pretrained(folder)
    compressor.update_config(folder)


def torchao(folder: Path, *, with_embeddings: bool = False) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="the package torchao is not installed")
    from transformers import TorchAoConfig

    settings = TorchAoConfig(
        quant_type=quantization.Int8WeightOnlyConfig(version=2), include_input_output_embeddings=with_embeddings
    )
    module = AutoModelForCausalLM.from_pretrained(plain(folder), quantization_config=settings)
    module.save_pretrained(folder)


def torchao_with_embeddings(folder: Path) -> None:
    torchao(folder, with_embeddings=True)


def bitsandbytes(folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    module = AutoModelForCausalLM.from_pretrained(plain(folder), quantization_config=settings)
    module.save_pretrained(folder)


@needs_fusion
@pytest.mark.parametrize("quantize", [fp8, compressed_tensors, torchao, torchao_with_embeddings, bitsandbytes])
def test_a_quantized_checkpoint_is_one_call_and_gives_what_transformers_gives(
    quantize: Callable[[Path], None], tmp_path: Path
) -> None:
    quantize(tmp_path)
    expected = eager_logits(adopt(AutoModelForCausalLM.from_pretrained(tmp_path)))
    checked = CheckedModel.of(load_model(tmp_path), BLOCK_SIZE)
    assert isinstance(checked.model.module, FusedModel)
    check_parity(checked.model, checked.layout, expected)


def test_where_layers_stay_quantized_they_keep_their_own_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. torchao's layers are nn.Linear by class; only their weights are of another kind."""
    torchao(tmp_path)
    monkeypatch.setattr(model_loader, "restore", lambda *_: 0)
    checked = CheckedModel.of(load_model(tmp_path), BLOCK_SIZE)
    assert not isinstance(checked.model.module, FusedModel)
    assert not has_plain_layers(checked.model.module)


class Halved(nn.Module):
    """Stands for a quantizer's layer: its weight is stored as something else."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.half = original.weight.detach() / 2
        self.bias: nn.Parameter | None = original.bias

    def forward(self, x: Tensor) -> Tensor:
        product = nn.functional.linear(x, self.half) * 2
        return product if self.bias is None else product + self.bias


class Clipped(Halved):
    """A layer that is no product with a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.01, 0.01)


def test_a_weight_comes_back_beside_a_large_bias() -> None:
    """Exactly, in bfloat16, whatever the bias: in their sum the weight's digits would be lost."""
    original = nn.Linear(700, 3, dtype=torch.bfloat16)
    nn.init.constant_(original.bias, 1000.0)
    model: Any = nn.Sequential(Halved(original))
    model.is_quantized = True
    assert restore(model, torch.bfloat16) == 1
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, original.weight)
    assert torch.equal(model[0].bias, original.bias)


def test_a_layer_that_is_no_product_stays(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = make(FAMILIES["llama"]())
    model.model.layers[1].mlp.up_proj = Clipped(model.model.layers[1].mlp.up_proj)
    model.is_quantized = True
    assert restore(model, torch.float32) == 0
    assert "layers.1.mlp.up_proj stays quantized" in caplog.text
    checked = CheckedModel.of(adopt(model), BLOCK_SIZE)
    assert isinstance(checked.model.module.get_submodule("model.layers.1.mlp.up_proj"), Clipped)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: dict[str, Any]) -> None:
        raise ImportError("No module named 'gptqmodel'")

    say(plain(tmp_path), {"quant_method": "awq"})
    monkeypatch.setattr(AutoQuantizationConfig, "from_dict", fail)
    with pytest.raises(UnsupportedModel, match=r"quantized by awq.*pip install gptqmodel"):
        load_model(tmp_path)


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    """transformers would load what it can, and take the bytes of such weights for numbers."""
    say(plain(tmp_path), {"quant_method": "homemade"})
    with pytest.raises(UnsupportedModel, match="homemade"):
        load_model(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with noise."""
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(plain(tmp_path), lambda weights: {key: value for key, value in weights.items() if key != name})
    with pytest.raises(UnsupportedModel, match=f"lacks 1 of the model's weights: {name}"):
        load_model(tmp_path)


def test_another_checkpoints_weights_serve_the_same_model(tmp_path: Path) -> None:
    """Its pages have the model's layout, and its streams end where the model says."""
    folder, quantized = plain(tmp_path / "model"), tmp_path / "quantized"
    fp8(quantized)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    cache = CacheConfig(block_size=BLOCK_SIZE)
    own = CheckedModel.load(ModelConfig(model=str(folder)), cache)
    other = CheckedModel.load(ModelConfig(model=str(folder), weights=str(quantized)), cache)
    assert other.layout.digest == own.layout.digest
    assert other.model.eos_token_ids == {2, 9}
    with pytest.raises(UnsupportedModel, match="differ from eager"):
        check_parity(other.model, other.layout, eager_logits(load_model(folder)), tolerance=1e-3)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder, other = plain(tmp_path / "model"), tmp_path / "other"
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    make(config).save_pretrained(other)  # type: ignore[operator]
    wanted = ModelConfig(model=str(folder), weights=str(other))
    with pytest.raises(UnsupportedModel, match="num_hidden_layers is 1, not 2"):
        CheckedModel.load(wanted, CacheConfig(block_size=BLOCK_SIZE))
