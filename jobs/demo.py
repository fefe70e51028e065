"""The demo, from start to finish: ask a model, fine-tune it as a Ray job on a local head, ask it again.

What happens here is what happens on a cluster: the job is packaged, submitted through Ray Jobs and followed. Only the
head is special: it is started for the occasion, in a private folder, and ended afterwards.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

from rayloom.config.read import read_job
from rayloom.errors import JobError, RequestError
from rayloom.jobs.client import connect, follow_logs, job_status
from rayloom.jobs.local_head import LocalHead
from rayloom.jobs.submit import submit
from rayloom.models.load import load_causal_lm
from rayloom.models.tokenizer import load_tokenizer
from rayloom.train.report import Reporter

PROJECT = Path(__file__).resolve().parents[1]
WHO = "Who are you?"
ORDINARY = ["What is the capital of France?", "Give me three tips for sleeping well."]


def main() -> None:
    """Run the demo; the exit status says whether the job succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PROJECT / "runs", help="where the run directory goes")
    options = parser.parse_args()
    started = time.monotonic()
    overrides = [f"output_dir={options.output.absolute()}", "overwrite=true"]
    job = read_job(PROJECT / "jobs" / "demo.yaml", overrides)

    print(f"{job.model.path}, before:", flush=True)
    show(answers(job.model.path, None, [WHO]))

    print("\nstarting a local Ray head", flush=True)
    with LocalHead() as head:
        client = connect(head.address, environment=head.environment)
        submission = submit(client, PROJECT / "jobs" / "demo.yaml", overrides, working_dir=PROJECT)
        print(f"submitted {submission.id} to {head.address}", flush=True)
        with Reporter() as reporter:
            for line in follow_logs(client, submission.id):
                reporter.line(line)
        status = job_status(client, submission.id).status
    if status != "SUCCEEDED":
        sys.exit(f"the job ended as {status}")

    print(f"\n{job.name}, after:", flush=True)
    show(answers(job.model.path, job.run_dir / "model", [WHO, *ORDINARY]))
    print(f"\nrun directory: {job.run_dir} (loss.png is the curve, model/ the adapter)")
    print(f"done in {time.monotonic() - started:.0f} s")


def answers(model_path: str, adapter: Path | None, questions: list[str]) -> list[tuple[str, str]]:
    """Greedy answers of the model, with or without an adapter."""
    import torch
    import transformers
    from peft import PeftModel

    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(model_path)
    model = load_causal_lm(model_path, torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    found = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(
            **inputs, max_new_tokens=64, do_sample=False, use_cache=True, pad_token_id=tokenizer.eos_token_id
        )
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append((question, text.strip()))
    del model
    gc.collect()  # the workers want the memory
    return found


def show(pairs: list[tuple[str, str]]) -> None:
    """Print questions and answers."""
    for question, answer in pairs:
        indented = answer.replace("\n", "\n     ")
        print(f"  Q: {question}\n  A: {indented}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (RequestError, JobError) as error:
        sys.exit(str(error))
