"""Train a small model of another family than the bundled one: `python tests/benchmarks/second_model.py FOLDER`.

So that no conclusion of `quality.py` is tuned to one model: a Qwen3 of 3M parameters with untied embeddings, trained
for some minutes on the standard library of the Python that runs, without the modules of the demonstration's texts.
"""

import runpy
import sys
import time
from pathlib import Path

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


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=12)
    options = parser.parse_args()
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokens = training_tokens()
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG))
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
    model.to(torch.bfloat16).save_pretrained(options.folder)
    AutoTokenizer.from_pretrained(DEMO / "stdlib-6m").save_pretrained(options.folder)
    print(f"{step} steps of {LENGTH * BATCH} tokens, loss {loss.item():.3f}: {options.folder}")


if __name__ == "__main__":
    main()
