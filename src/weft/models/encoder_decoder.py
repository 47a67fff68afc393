"""The facts about encoder-decoder architectures: T5 and its kin."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from weft.base.embeddings import config_of, input_embeddings, output_head, stacks
from weft.base.kinds import is_activation, is_norm, linears_in
from weft.core.architecture import Architecture
from weft.errors import UserError
from weft.layouts.encoder_decoder import start_token
from weft.ops.loss import HeadForm


@dataclass(frozen=True)
class StackFacts:
    """Ends of paths within a block of either stack; ``memory`` are the linears that read the encoder's states."""

    attention_output: tuple[str, ...]
    mlp_output: str
    memory: tuple[str, ...]


_T5 = StackFacts(
    ("SelfAttention.o", "EncDecAttention.o"), "DenseReluDense.wo", ("EncDecAttention.k", "EncDecAttention.v")
)
ENCODER_DECODERS: dict[str, StackFacts] = {"t5": _T5, "mt5": _T5, "umt5": _T5}


def describe_encoder_decoder(model: nn.Module) -> Architecture:
    """The ``Architecture`` of an encoder-decoder: the encoder's blocks and then the decoder's.

    ``num_layers`` is the decoder's, where learned keys and values stand.

    Raises:
        UserError: Weft does not know the model type, or nothing says with which token the decoder begins.
    """
    config = config_of(model)
    facts = ENCODER_DECODERS.get(config.model_type)
    if facts is None:
        raise UserError(
            f"{config.model_type} is an encoder-decoder that Weft does not know; of these it trains "
            f"{', '.join(sorted(ENCODER_DECODERS))}."
        )
    start_token(model)
    paths = {id(module): path for path, module in model.named_modules()}
    of_encoder, of_decoder = (_blocks(stack, paths[id(stack)]) for stack in stacks(model))
    blocks = (*of_encoder, *of_decoder)
    linears = linears_in(model, blocks)
    # T5 scales its head's input where the head is tied to the embeddings.
    scaled = getattr(config, "scale_decoder_outputs", config.model_type == "umt5")
    return Architecture(
        model_type=config.model_type,
        hidden_size=config.d_model,
        num_layers=len(of_decoder),
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.d_kv,
        blocks=blocks,
        linears=linears,
        norms=tuple(path for path, module in model.named_modules() if is_norm(module)),
        attention_output=tuple(path for path in linears if path.endswith(facts.attention_output)),
        mlp_output=tuple(path for path in linears if path.endswith(facts.mlp_output)),
        activations=tuple(path for path, module in model.named_modules() if is_activation(module)),
        embeddings=paths[id(input_embeddings(model))],
        head=paths[id(output_head(model))],
        memory_linears=tuple(path for path in linears if path.endswith(facts.memory)),
        peft_task="SEQ_2_SEQ_LM",
        head_form=HeadForm(config.d_model**-0.5 if scaled else 1.0),
    )


def _blocks(stack: nn.Module, path: str) -> tuple[str, ...]:
    """Paths of a stack's blocks: its outermost ModuleList (a T5 block holds one of its own)."""
    name, blocks = next((n, m) for n, m in stack.named_modules() if isinstance(m, nn.ModuleList))
    return tuple(f"{path}.{name}.{i}" for i in range(len(blocks)))
