"""What the Model Loader does where ZeRO-3 shards the weights over two processes: the same as on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from rayloom.models.config import ModelConfig
from rayloom.models.load import load_causal_lm
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer

SETTINGS = {"add_tokens": ["<one>", "<two>"], "token_descriptions": {"<two>": "the lazy dog"}}

RANK = """
import json, os, sys
from pathlib import Path

rank, folder, path, settings = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
import deepspeed, torch
from safetensors.torch import load_file
from transformers.integrations import HfDeepSpeedConfig

from rayloom.models.config import ModelConfig
from rayloom.models.load import load_causal_lm
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer
from rayloom.models.value_head import ValueHead, load_value_head, save_value_head

GatheredParameters = deepspeed.zero.GatheredParameters
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
deepspeed.init_distributed("gloo")
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
kept = HfDeepSpeedConfig(config)  # transformers looks for it as long as it lives

model = ModelConfig(path=path, **settings)
loaded = load_causal_lm(model, torch.float32, tokenizer=load_tokenizer(TokenizerSource.of(model)), seed=7)
wanted = load_file(folder / "wanted.safetensors")
parameters = dict(loaded.named_parameters())
assert parameters["model.layers.0.mlp.up_proj.weight"].numel() == 0  # grown embeddings: sharded by the engine
for name, parameter in parameters.items():
    with GatheredParameters([parameter]):
        torch.testing.assert_close(parameter.detach(), wanted[name], msg=name)

with deepspeed.zero.Init(config_dict_or_path=config):
    head, other = ValueHead(8), ValueHead(8)
assert head.summary.weight.numel() == 0
with GatheredParameters(list(head.parameters()), modifier_rank=0):
    if rank == 0:
        head.summary.weight.data.copy_(torch.arange(8.0))
        head.summary.bias.data.fill_(3)
save_value_head(head, folder, is_writer=rank == 0)
torch.distributed.barrier()
load_value_head(other, folder)
with GatheredParameters(list(other.parameters())):
    assert other.summary.weight.flatten().tolist() == list(range(8))
    assert other.summary.bias.item() == 3
torch.distributed.barrier()
os._exit(0)  # gloo's threads have been seen to abort an interpreter that takes itself down around them
"""


def test_vocabulary_and_value_head_under_zero3(tiny_model: Path, tmp_path: Path) -> None:
    model = ModelConfig.model_validate({"path": str(tiny_model), **SETTINGS})
    plain = load_causal_lm(model, torch.float32, tokenizer=load_tokenizer(TokenizerSource.of(model)), seed=7)
    save_file({name: one.detach().clone() for name, one in plain.named_parameters()}, tmp_path / "wanted.safetensors")
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path), str(tiny_model), json.dumps(SETTINGS)],
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / f"errors-{rank}").open("w"),
        )
        for rank in range(2)
    ]
    try:
        ends = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ends == [0, 0], "".join((tmp_path / f"errors-{rank}").read_text()[-3000:] for rank in range(2))
