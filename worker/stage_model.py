"""One rank's part of the model: its stage's layers, and the embedding and output head where routes need them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hexgen.errors import EngineError
from hexgen.plan import Layers
from hexgen.worker.attention_choice import Attention
from hexgen.worker.batch_inputs import BatchInputs
from hexgen.worker.checkpoint import Checkpoint, torch_dtype
from hexgen.worker.communicator import Communicator
from hexgen.worker.config import RankConfig
from hexgen.worker.cpu_kernels import CpuStage, choose_cpu_kernels
from hexgen.worker.kv import KVPool
from hexgen.worker.layers import LayerRunner, LayerWeights, Part, StepContext, layer_parts
from hexgen.worker.rope import RotaryEmbedding
from hexgen.worker.weight_layouts import AsStored, Layout, Transposed

Progress = Callable[[int, int], None]  # bytes read, bytes to read


class StageModel:
    """Loads this rank's slices and runs them. All ranks of the stage must make the same calls in the same order.

    ``weights_bytes`` is what the tensors take here, ``bytes_read`` what was read from the checkpoint. Results are
    inference tensors: whoever writes to them in place does so inside ``torch.inference_mode()``.
    """

    def __init__(
        self,
        config: RankConfig,
        checkpoint: Checkpoint,
        communicator: Communicator,
        on_progress: Progress | None = None,
    ) -> None:
        self.device = torch.device(config.device)
        self.dtype = torch_dtype(config.dtype)
        self._config = config
        self._model = config.model
        self._slice = config.slices[config.rank]
        self._communicator = communicator
        self._embeds = any(route.embeds for route in config.routes)
        self._samples = any(route.samples for route in config.routes)
        kernels = choose_cpu_kernels(self.device, self.dtype)
        halves = self.device.type == "cpu" and self.dtype != torch.float32
        self._torch_layout = AsStored() if halves else Transposed()  # where there are no CPU kernels
        self._layout: Layout = self._torch_layout if kernels is None else kernels.layout
        with torch.inference_mode():
            self._load(checkpoint, on_progress)
        self._cpu: CpuStage | None = None
        if kernels is not None:
            self._cpu = CpuStage(
                kernels, self._model, self._slice, communicator, self._layers, config.page_size, config.threads
            )
        self._rope = RotaryEmbedding(self._model, self.dtype, self.device)
        self._runner = LayerRunner(
            self._model, self._slice, communicator, self.device, self.dtype, config.page_size
        )

    # ---- loading -----------------------------------------------------------------------------------------

    def _load(self, checkpoint: Checkpoint, on_progress: Progress | None) -> None:
        model, first, last = self._model, *self._config.layers
        embedding, head = self._vocab_parts(checkpoint)
        norm = Part("model.norm.weight", (model.hidden_size,))
        parts = [p for i in range(first, last) for p in layer_parts(model, self._slice, i).values()]
        parts += [embedding] if self._embeds else []
        parts += [norm] if self._samples else []
        parts += [head] if self._samples and (head != embedding or not self._embeds) else []
        for part in parts:  # all of them before the first byte is read
            checkpoint.expect(part.name, part.shape)
        total = sum(checkpoint.stored_bytes(p.name, p.dim, p.start, p.end) for p in parts)
        begun = checkpoint.bytes_read

        def read(part: Part) -> torch.Tensor:
            tensor = checkpoint.read(
                part.name, part.dim, part.start, part.end, dtype=self.dtype, shape=part.shape
            ).to(self.device)
            if on_progress is not None:
                on_progress(checkpoint.bytes_read - begun, total)
            return tensor

        self._layers = {
            i: LayerWeights.load(model, self._slice, i, read, self._layout) for i in range(first, last)
        }
        # A tied matrix that both embeds and samples is held once, as the head needs it.
        shared = self._embeds and self._samples and head == embedding
        self._embedding = read(embedding) if self._embeds and not shared else None
        self._norm_weight = read(norm) if self._samples else None
        self._head = self._layout.matrix(read(head)) if self._samples else None
        self.bytes_read = checkpoint.bytes_read - begun
        held = [t for layer in self._layers.values() for t in layer.tensors()]
        held += [t for t in (self._embedding, self._norm_weight, self._head) if t is not None]
        self.weights_bytes = sum(t.nbytes for t in held)

    def _vocab_parts(self, checkpoint: Checkpoint) -> tuple[Part, Part]:
        """This rank's rows of the embedding and of the output head; equal where they are tied."""
        shape = (self._model.vocab_size, self._model.hidden_size)
        embedding = Part("model.embed_tokens.weight", shape, 0, *self._slice.vocab)
        if self._model.tie_embeddings:
            return embedding, embedding
        return embedding, Part("lm_head.weight", shape, 0, *self._slice.vocab)

    @property
    def attention(self) -> Attention:
        """The implementation that was chosen for this device."""
        return self._runner.attention

    # ---- running -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(self, batch: BatchInputs) -> torch.Tensor:
        """``[tokens, hidden]``; a stage that embeds looks up its own rows of the vocabulary and adds them up."""
        first, last = self._slice.vocab
        ids = batch.tokens
        if self._communicator.size == 1:
            return self._rows(ids)
        if first == last:  # more ranks than the vocabulary has rows: nothing to look up, still part of the sum
            hidden = torch.zeros((ids.shape[0], self._model.hidden_size), dtype=self.dtype, device=self.device)
        else:
            mine = (ids >= first) & (ids < last)
            hidden = self._rows((ids - first).clamp_(0, last - first - 1)).mul_(mine[:, None])
        self._communicator.all_reduce(hidden)
        return hidden

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        if self._embedding is not None:
            return self._embedding.index_select(0, ids)
        if self._head is None or not self._embeds:
            raise EngineError("this stage holds no embedding", where=self._config.stage)
        if self._cpu is not None:
            return self._cpu.embed(self._head, ids)
        return self._torch_layout.rows(self._head, ids)

    @torch.inference_mode()
    def forward(self, hidden: torch.Tensor, batch: BatchInputs, pool: KVPool, layers: Layers) -> torch.Tensor:
        """Run layers ``[start, end)`` over ``hidden`` ``[tokens, hidden]``, which is overwritten and returned.

        ``pool`` holds those layers' keys and values, the first of them as its layer 0.
        """
        if tuple(hidden.shape) != (batch.n_tokens, self._model.hidden_size):
            raise EngineError(f"hidden states of shape {list(hidden.shape)} for {batch.n_tokens} tokens")
        if pool.layers != layers[1] - layers[0] or any(i not in self._layers for i in (layers[0], layers[1] - 1)):
            raise EngineError(
                f"layers {list(layers)} do not fit the stage or its KV pool", where=self._config.stage
            )
        if batch.n_tokens == 0:
            return hidden
        if self._cpu is not None:
            hidden = hidden.contiguous()
            self._cpu.forward(hidden, StepContext(batch, *self._cpu.rotary(self._rope, batch)), pool, layers)
            return hidden
        cos, sin = self._rope.tables(batch.positions, batch.lengths)
        step = StepContext(batch, cos, sin)
        for i in range(*layers):
            self._runner.run(hidden, self._layers[i], step, pool.layer(i - layers[0]), self._model.window(i))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """``[rows, n_vocab of this rank]`` float32: final norm and this rank's rows of the head, not gathered.
        Valid until the next call.
        """
        if self._head is None or self._norm_weight is None:
            raise EngineError("this stage holds no output head", where=self._config.stage)
        if self._cpu is not None:
            return self._cpu.logits(hidden_rows, self._norm_weight, self._head)
        return torch.mm(self._runner.normalised(hidden_rows, self._norm_weight), self._head).float()
