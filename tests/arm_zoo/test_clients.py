"""Software that others make, over our models as over timm's: quantisers, counters, adapters, tracers, sharding."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.flop_counter import FlopCounterMode

import arm_zoo
from arm_zoo.ops import available_backends, scan_backend

BACKENDS = [name for name in available_backends() if name in ("reference", "torch", "numba")]  # of the CPU


def pico(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("arm_pico_patch2_8", **kwargs).eval()


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the largest number."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# ------------------------------------------------------------------------------------------- quantisers and counters


@pytest.mark.parametrize("config", ["Int8WeightOnly", "Int8DynamicActivationInt8Weight", "Float8WeightOnly"])
def test_torchao_quantises_on_the_cpu(config: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = pico(pretrained=True)
    x, small = images(), copy.deepcopy(model)
    torchao.quantize_(small, getattr(torchao, f"{config}Config")())
    assert all(type(layer.weight) not in (nn.Parameter, torch.Tensor) for layer in linear_layers(small))
    assert 0 < error(small(x), model(x)) < 0.1


def test_dynamic_quantisation_converts_all_linear_layers() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = pico(pretrained=True)
    x, small = images(), quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    converted = [module for module in small.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(converted) == len(linear_layers(model)) == 4 * len(model.blocks) + 1
    assert not linear_layers(small)
    assert 0 < error(small(x), model(x)) < 0.1


def test_flops_of_torch_and_ptflops() -> None:
    model, size = timm.create_model("arm_tiny_patch8_64").eval(), (3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *size))
    assert counter.get_total_flops() / 2 == pytest.approx(352.2e6, abs=5e4)
    ptflops = pytest.importorskip("ptflops")
    macs, parameters = ptflops.get_model_complexity_info(model, size, as_strings=False, print_per_layer_stat=False)
    assert macs == pytest.approx(352.2e6, rel=1e-2)  # with norms and biases
    assert parameters == sum(parameter.numel() for parameter in model.parameters())


def test_thop_counts_the_layers() -> None:
    thop = pytest.importorskip("thop")
    model = pico()
    tokens = model.order.shape[1]
    expected = sum(layer.weight.numel() for layer in linear_layers(model.blocks)) * tokens
    expected += model.head.weight.numel() + model.patch_embed.proj.weight.numel() * (tokens - 1)
    macs, _ = thop.profile(copy.deepcopy(model), (images(1),), verbose=False)
    norms = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert expected <= macs <= expected + 4 * norms * tokens * model.embed_dim


# ------------------------------------------------------------------------------------------------------- tracers


@pytest.mark.parametrize("kwargs", [{}, {"dynamic_img_size": True}, {"drop_path_rate": 0.1, "global_pool": "token"}])
def test_features_by_torchvision(kwargs: dict[str, object]) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = pico(**kwargs)
    _, nodes = extraction.get_graph_node_names(model)
    assert {"blocks.1.mixer.in_proj", "blocks.1.mixer.mamba_inner", "blocks.1.mlp.fc1", "head"} <= set(nodes)
    found = []
    model.blocks[1].mixer.out_proj.register_forward_hook(lambda _, inputs, output: found.append(output))
    extractor = extraction.create_feature_extractor(model, ["blocks.1.mixer.out_proj", "head"])
    for x in (images(), torch.randn(2, 1, 12, 8)) if "dynamic_img_size" in kwargs else (images(),):
        expected = model(x)
        features = extractor(x)
        assert error(features["head"], expected) < 1e-5
        assert error(features["blocks.1.mixer.out_proj"], found[-1]) < 1e-5
    extractor.train()(x)["head"].sum().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())


def test_torch_fx_traces_the_checks_too() -> None:
    model = pico()
    traced = torch.fx.symbolic_trace(model)
    assert error(traced(images()), model(images())) < 1e-5
    with pytest.raises(ValueError, match="expected images of 8x8, got 8x10"):
        traced(torch.randn(1, 1, 8, 10))


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("backend", BACKENDS[1:])  # the reference has no choice, and the tracer unrolls its loop
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:FutureWarning")
def test_torch_jit_trace(backend: str, with_gradients: bool) -> None:
    """Its own check runs without gradients, and must find the same operations."""
    model, x = pico(depth=1), images(3)
    with scan_backend(backend):
        with torch.set_grad_enabled(with_gradients):
            traced = torch.jit.trace(model, images())
        assert error(traced(x), model(x)) < 1e-5
        gradients = [torch.autograd.grad(m(x).square().sum(), model.blocks[0].mixer.A_log)[0] for m in (traced, model)]
    assert error(*gradients) < 1e-4


# ------------------------------------------------------------------------------------------------------ adapters


def test_peft_adapts_the_patch_embedding() -> None:
    peft = pytest.importorskip("peft")
    model, x = pico(), images()
    expected = model(x)
    targets = ["patch_embed.proj", "in_proj", "out_proj", "fc1", "fc2"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
    assert error(adapted(x), expected) < 1e-5
    adapted(x).sum().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * (1 + 4 * len(model.blocks)), "an adapter was passed by"
    with pytest.raises(TypeError, match="patch size; merge or take away what was added to it"):
        model.set_input_size(patch_size=4)
    assert model.patch_embed.patch_size == (2, 2)
    assert error(adapted.merge_and_unload()(x), expected) < 1e-5


# ------------------------------------------------------------------------------------- tables without values, sharding


@pytest.mark.parametrize("include_buffers", [False, True])
def test_accelerate_loads_into_an_empty_model(include_buffers: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = pico()
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        empty = pico()
    assert empty.order.is_meta == include_buffers
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
    )
    assert loaded(images()).equal(model(images()))


@pytest.mark.parametrize("make", [pico, partial(arm_zoo.create_pretraining_model, "arm_pico")])
@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_bring_the_tables(make: partial[nn.Module], assign: bool) -> None:
    model, empty = make(), make(device="meta")
    if not assign:
        empty.to_empty(device="cpu")
        for table in empty.buffers():
            table.fill_(1)  # whatever lies in empty memory
    empty.load_state_dict(model.state_dict(), assign=assign)
    for table, expected in zip(empty.buffers(), model.buffers(), strict=True):
        assert table.equal(expected)
    outputs = [m(images()) for m in (empty, model)]
    assert all(a.equal(b) for a, b in zip(*((y,) if isinstance(y, torch.Tensor) else y for y in outputs), strict=True))


def start(rank: int, processes: int, file: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    start(0, 1, tmp_path / "store")
    yield
    dist.destroy_process_group()


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fsdp2_shards_on_the_cpu(backend: str, one_process: None) -> None:
    model, x = pico(), images()
    with scan_backend(backend):
        sharded = shard(copy.deepcopy(model))
        for _ in range(2):
            assert sharded(x).equal(model(x))
            sharded(x).sum().backward()


@pytest.mark.parametrize("make", [pico, partial(arm_zoo.create_pretraining_model, "arm_pico")])
def test_fsdp2_initialises_what_was_on_the_meta_device(make: partial[nn.Module], one_process: None) -> None:
    torch.manual_seed(0)
    model = make()
    sharded = shard(make(device="meta")).to_empty(device="cpu")
    for table in sharded.buffers():
        table.fill_(1)
    sharded.init_weights()
    whole = {name: parameter.full_tensor() for name, parameter in sharded.named_parameters()}
    for name, parameter in model.named_parameters():
        assert whole[name].shape == parameter.shape
        if name.endswith(("A_log", "D")) or not parameter.requires_grad:  # the same whatever is drawn
            assert whole[name].equal(parameter)
        if name.endswith("dt_proj_bias"):
            step = nn.functional.softplus(whole[name][0])
            assert 1e-3 <= step.min() < step.max() <= 1e-1 + 1e-6 and not whole[name][1:].any()
    for table, expected in zip(sharded.buffers(), model.buffers(), strict=True):
        assert table.equal(expected)


def _tensor_parallel(rank: int, processes: int, file: Path) -> None:
    torch.set_num_threads(1)
    start(rank, processes, file)
    model, x = pico(), images()
    expected = model(x)
    mesh = init_device_mesh("cpu", (processes,))
    whole = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    plan = {name: ColwiseParallel(**whole) for name in ("mixer.in_proj", "mlp.fc1")}
    plan |= {name: RowwiseParallel(**whole) for name in ("mixer.out_proj", "mlp.fc2")}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    assert len(model.blocks[0].mlp.fc1.weight.to_local()) == len(model.blocks[0].mlp.fc1.weight) // processes
    assert error(model(x), expected) < 1e-5
    with torch.no_grad():
        assert error(model(x), expected) < 1e-5
    dist.destroy_process_group()


@pytest.mark.slow
def test_tensor_parallel_layers_give_the_same(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_tensor_parallel, (2, tmp_path / "store"), nprocs=2)
