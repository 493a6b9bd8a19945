"""Train the bundled demo model, or its draft, on the Python standard library's own sources.

    python examples/train_demo_model.py --out hexgen/bundled/demo --minutes 60
    python examples/train_demo_model.py --out hexgen/bundled/draft --shape draft --minutes 10 \
        --tokenizer hexgen/bundled/demo/tokenizer.json

The learning rate follows the share of the time (or of `--steps`) that has passed, so training
ends annealed on any machine. Checkpoints go to `--work`; `--resume` goes on from the last one,
and `--export-only` writes the best one so far to `--out` without training.
"""

import argparse
import json
import math
import os
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from train_demo.corpus import (
    HeldOut,
    Packer,
    conversations,
    encode_all,
    read_documents,
    split_documents,
    train_tokenizer,
)
from train_demo.export import export
from train_demo.model import SHAPES, Llama
from train_demo.optim import Optimizer

QUICK_TOKENS = 49152  # of the held-out text, for the losses reported while training


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the Hugging Face directory to write")
    add("--work", type=Path, help="checkpoints and log (default: OUT with '.work' added)")
    add("--source", type=Path, default=Path(sysconfig.get_path("stdlib")), help="*.py to learn")
    add("--shape", choices=sorted(SHAPES), default="demo", help="the size of the network")
    add("--vocab", type=int, default=4096, help="tokens, when a tokenizer is trained")
    add("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    add("--minutes", type=float, default=60.0, help="wall time to train for")
    add("--steps", type=int, help="train for this many steps instead")
    add("--tokens", type=int, default=2048, help="tokens in one step")
    add("--context", type=int, default=512, help="tokens in one window")
    add("--long-share", type=float, default=0.1, help="last share of training, at full context")
    add("--chat-share", type=float, default=0.06, help="chat-formatted functions, by tokens")
    add("--dropout", type=float, default=0.0)
    add("--seed", type=int, default=20261121)
    add("--threads", type=int, default=min(os.cpu_count() or 1, 16))
    add("--evaluate-every", type=float, default=300.0, help="seconds between held-out losses")
    add("--save-every", type=float, default=120.0, help="seconds between checkpoints")
    add("--no-compile", action="store_true", help="do without torch.compile")
    add("--resume", action="store_true", help="go on from the last checkpoint in --work")
    add("--export-only", action="store_true", help="export what --work holds, and stop")
    args = parser.parse_args()
    args.work = args.work or args.out.with_name(args.out.name + ".work")
    return args


class Trainer:
    """The model, its optimiser and its data, and where they stand."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.work.mkdir(parents=True, exist_ok=True)
        self.last, self.best = args.work / "last.pt", args.work / "best.pt"
        kept, held_out = split_documents(read_documents(args.source))
        self.tokenizer = self._tokenizer(lambda: train_tokenizer(kept, args.vocab))
        self.held_out = HeldOut(held_out, self.tokenizer)
        files = encode_all(self.tokenizer, [d.text for d in kept])
        chats = encode_all(self.tokenizer, conversations(kept))
        self.packer = Packer(files, chats, args.chat_share, args.seed)

        torch.manual_seed(args.seed)
        self.shape = replace(SHAPES[args.shape], vocab=self.tokenizer.get_vocab_size())
        self.model = Llama(self.shape, args.dropout)
        self.optimizer = Optimizer(self.model)
        self.step, self.trained, self.elapsed = 0, 0, 0.0
        self.best_loss = math.inf
        self.report(
            event="start",
            parameters=sum(p.numel() for p in self.model.parameters()),
            files=len(kept),
            bytes=sum(len(d.text.encode()) for d in kept),
            tokens=sum(map(len, files)),
            chats=len(chats),
            held_out_files=len(held_out),
            held_out_tokens=len(self.held_out.tokens),
        )

    def _tokenizer(self, train: Any) -> Tokenizer:
        """The given one, or the one of the run being resumed, or a new one."""
        mine = self.args.work / "tokenizer.json"
        if self.args.tokenizer is not None:
            return Tokenizer.from_file(str(self.args.tokenizer))
        if mine.exists() and (self.args.resume or self.args.export_only):
            return Tokenizer.from_file(str(mine))
        tokenizer: Tokenizer = train()
        tokenizer.save(str(mine))
        return tokenizer

    def report(self, **what: Any) -> None:
        """One line of JSON, to the screen and to the log."""
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in what.items()}
        line = json.dumps(rounded)
        print(line, flush=True)
        with (self.args.work / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def save(self) -> None:
        """Write the checkpoint that `--resume` reads."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "place": (self.step, self.trained, self.elapsed, self.best_loss),
            "data": (self.packer.epoch, self.packer.cursor),
        }
        _save(state, self.last)

    def load(self) -> None:
        """Go back to the last checkpoint."""
        state = torch.load(self.last)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.trained, self.elapsed, self.best_loss = state["place"]
        self.packer.seek(*state["data"])

    def progress(self) -> float:
        """The share of the training that is done."""
        if self.args.steps is not None:
            return self.step / self.args.steps
        return self.elapsed / (60 * self.args.minutes)

    def evaluate(self) -> None:
        """Held-out loss on a part of the files; keep the weights if they are the best so far."""
        losses = self.held_out.loss(self.model, self.args.context, QUICK_TOKENS)
        self.report(event="held-out", step=self.step, **losses._asdict())
        if losses.nats_per_token < self.best_loss:
            self.best_loss = losses.nats_per_token
            _save(self.model.state_dict(), self.best)

    def train(self) -> None:
        """Train until the time, or the steps, are used up."""
        args = self.args
        run = self.model if args.no_compile else torch.compile(self.model, dynamic=False)
        begun = time.monotonic() - self.elapsed
        saved = evaluated = logged = self.elapsed
        logged_tokens = self.trained
        while (progress := self.progress()) < 1:
            long = progress >= 1 - args.long_share
            context = self.shape.max_positions if long else args.context
            batch = self.packer.batch(max(1, args.tokens // context), context)
            loss = run(batch).mean()
            loss.backward()
            self.optimizer.step(progress)
            self.step, self.trained = self.step + 1, self.trained + batch[:, 1:].numel()
            self.elapsed = time.monotonic() - begun
            if self.step % 20 == 0 or self.step == 1:
                speed = (self.trained - logged_tokens) / max(self.elapsed - logged, 1e-6)
                logged, logged_tokens = self.elapsed, self.trained
                self.report(
                    event="train",
                    step=self.step,
                    loss=loss.item(),
                    progress=progress,
                    epoch=self.packer.epoch,
                    tokens=self.trained,
                    tokens_per_second=round(speed),
                )
            if self.elapsed - evaluated > args.evaluate_every:
                self.evaluate()
                evaluated = self.elapsed
            if self.elapsed - saved > args.save_every:
                self.save()
                saved = self.elapsed
        self.save()
        self.evaluate()

    def export(self) -> None:
        """Write the best weights so far, and the held-out loss of what was written."""
        source = self.best if self.best.exists() else self.last
        state = torch.load(source)
        state = state.get("model", state)
        self.model.load_state_dict({n: w.bfloat16().float() for n, w in state.items()})
        export(self.args.out, self.shape, self.model.state_dict(), self.tokenizer)
        for context in (self.args.context, self.shape.max_positions):
            losses = self.held_out.loss(self.model, context)
            self.report(event="exported", context=context, **losses._asdict())


def _save(state: Any, path: Path) -> None:
    new = path.with_name(path.name + ".new")
    torch.save(state, new)
    os.replace(new, path)


def main() -> None:
    """Train and export, or only export."""
    args = arguments()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args)
    if not args.export_only:
        if args.resume:
            trainer.load()
        trainer.train()
    trainer.export()


if __name__ == "__main__":
    main()
