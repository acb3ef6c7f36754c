"""Train a small model of another family than the bundled one: `python tests/benchmarks/second_model.py FOLDER`.

So that no conclusion of `quality.py` is tuned to one model: a Qwen3 of 3M parameters with untied embeddings, trained
for some minutes on the standard library of the Python that runs, without the modules of the demonstration's texts.
With `--experts 8` a mixture of experts for `expert_rules.py`: a Qwen3-MoE whose tokens go to two experts each.
"""

import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import DEMO, command_line
from rich.progress import track

LENGTH, BATCH, RATE = 256, 8, 2e-3
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
MIXTURE = {
    "moe_intermediate_size": 192,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "output_router_logits": True,  # adds the loss that keeps all experts in use
    "router_aux_loss_coef": 0.01,
}


def training_tokens() -> torch.Tensor:
    """The standard library as sequences, int64 [sequences, LENGTH]."""
    from transformers import AutoTokenizer  # takes seconds; --help needs none

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "stdlib-6m")
    text = runpy.run_path(str(DEMO / "text.py"))
    kept_out = {
        f"{name.rpartition('.')[2]}.py" for kind in ("CALIBRATION", "EVALUATION") for name in text[f"{kind}_MODULES"]
    }
    library = Path(sys.modules["os"].__file__ or "").parent
    files = [f for f in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(f.parts)]
    tokens: list[int] = []
    for file in track(files, description="reading"):
        if file.name not in kept_out:
            tokens += tokenizer(file.read_text(errors="ignore"), add_special_tokens=False)["input_ids"]
    whole = len(tokens) // LENGTH
    return torch.tensor(tokens[: whole * LENGTH]).view(whole, LENGTH)


def random_model(experts: int) -> Any:
    """A Qwen3, or a Qwen3-MoE with so many experts, not trained yet."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    if not experts:
        return Qwen3ForCausalLM(Qwen3Config(**CONFIG))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG | MIXTURE, num_experts=experts))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--experts", type=int, default=0, help="in every block, for a mixture of experts")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokens = training_tokens()
    model = random_model(options.experts)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    started, loss, step = time.monotonic(), torch.tensor(0.0), 0
    while (done := (time.monotonic() - started) / 60 / options.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (1 - done)
        batch = tokens[torch.randint(len(tokens), (BATCH,))]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {done:.0%}: loss {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(options.folder)
    AutoTokenizer.from_pretrained(DEMO / "stdlib-6m").save_pretrained(options.folder)
    print(f"{step} steps of {LENGTH * BATCH} tokens, loss {loss.item():.3f}: {options.folder}")


if __name__ == "__main__":
    main()
