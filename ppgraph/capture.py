"""From Dynamo's graph to a `Program`: one normalised ATen graph that knows its parameters and its token mask.

Together with `backend.py` and `transform.py` the only code that knows names of transformers' arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

from ppgraph import _torch
from ppgraph.config import PruneConfig
from ppgraph.passes.base import Program, same_size, shape_of
from ppgraph.passes.operators import COMPOSITES, is_view
from ppgraph.sharding import localise

aten = torch.ops.aten

ATTENTION_MASK = "attention_mask"
TOKENS = ("input_ids", "inputs_embeds")


def capture(module: GraphModule, config: PruneConfig, positional: Sequence[str] = ()) -> tuple[Program, list[Any]]:
    """Normalise a graph that Dynamo handed to its backend.

    `positional` are the names of arguments that the model's forward was given by position. Returns the program and the
    fake values of its inputs. Must run inside `_torch.graph_world`.
    """
    sharded = localise(module)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    sources = [_torch.placeholder_source(node) for node in placeholders]
    values = _torch.placeholder_values(module)
    arguments = [_torch.source_argument(source, positional) for source in sources]
    _unite_sizes_of_caches([value for value, name in zip(values, arguments, strict=True) if name != ATTENTION_MASK])
    traced = _torch.to_aten(module, values, COMPOSITES)
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    parameters: dict[Node, str] = {}
    masks: list[Node] = []
    batch: tuple[Any, Any] | None = None
    for node, source, argument in zip(inputs, sources, arguments, strict=True):
        name = _torch.source_parameter(source)
        if name:
            parameters[node] = name
        if argument == ATTENTION_MASK and node.meta["val"].dim() in (2, 4):
            masks.append(node)
        elif argument in TOKENS and node.meta["val"].dim() >= 2:
            samples, tokens, *_ = shape_of(node)
            batch = samples, tokens
    normalise(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    # Models with several kinds of layers take a mask for each; all of them tell the same tokens.
    program = Program(traced, config, parameters, masks[0] if masks else None, batch)
    pairs = zip(inputs, placeholders, strict=True)
    program.sharded = {node: sharded[placeholder] for node, placeholder in pairs if placeholder in sharded}
    return program, values


def _unite_sizes_of_caches(values: Sequence[Any]) -> None:
    """Let keys and values that are inputs have one symbol for how many they are, where all are as many.

    Dynamo gives each tensor its own, by which no layer would be like another: Inductor would compile all of them.
    """
    alike: dict[int | None, list[torch.SymInt]] = {}
    for value in values:
        size: Any = value.shape[2] if isinstance(value, torch.Tensor) and value.dim() == 4 else None
        if isinstance(size, torch.SymInt):
            alike.setdefault(_torch.hint(size), []).append(size)
    for sizes in alike.values():
        _torch.unite(sizes)


def install_output_hooks(model: nn.Module) -> None:
    """Have transformers install the hooks by which it collects hidden states and attentions, before Dynamo looks.

    It does so at the first call that asks for them, under a lock that Dynamo can't trace (transformers 5.24).
    """
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # an older transformers collects them in the models' own code
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            maybe_install_capturing_hooks(module)


def normalise(module: GraphModule) -> None:
    """Spell alike what transformers spells in several ways; the graph computes the same as before."""
    for node in list(module.graph.nodes):
        for rule in NORMALISATIONS:
            if rule(node):
                break


def _drop_empty_from_cat(node: Node) -> bool:
    """A fresh cache joins its first keys to an empty tensor, a rotary embedding of all of a head an empty rest of it.

    Without it the other tensor is seen as what it is.
    """
    if node.target is not aten.cat.default:
        return False
    tensors: Any = node.args[0]
    filled = [tensor for tensor in tensors if not _is_empty(tensor)]
    if len(filled) != 1 or len(tensors) == 1:
        return False
    # A copy, as cat makes: the strides of what the cache gets decide whether the next step's graph fits.
    node.target, node.args = aten.clone.default, (filled[0],)
    node.kwargs = {"memory_format": torch.contiguous_format}
    return True


def _is_empty(node: Node) -> bool:
    """Whether this has no elements, by its shape; a size that only running tells is not asked for."""
    return any(isinstance(size, int) and size == 0 for size in shape_of(node))


def _lay_out_slice(node: Node) -> bool:
    """A product reads a slice of the tokens (`logits_to_keep`) laid out as a matrix.

    With sizes unknown at compile time PyTorch can't see that the slice folds, and multiplies sample by sample, slowly.
    """
    source = node.args[0] if node.target is aten.linear.default else None
    if not isinstance(source, Node) or source.target is not aten.slice.Tensor:
        return False
    with node.graph.inserting_before(node):
        copied = node.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    copied.meta = {**source.meta, "val": source.meta["val"].clone(memory_format=torch.contiguous_format)}
    node.replace_input_with(source, copied)
    return True


def _spell_type_as_cast(node: Node) -> bool:
    """`x.type_as(y)` needs only y's dtype: as a cast it does not tie x to all that y is made of."""
    if node.target is not aten.type_as.default:
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    if source.meta["val"].device != node.meta["val"].device:
        return False
    node.target, node.args = aten.to.dtype, (source, node.meta["val"].dtype)
    return True


def _assign_to_slice(node: Node) -> bool:
    """`x[..., a:b] = y` becomes `slice_scatter`, so that what is in x can be seen from its operands."""
    base = _written_through_slice(node) if node.target is aten.copy_.default else None
    if base is None:
        return False
    piece, source = node.args[:2]
    assert isinstance(piece, Node)
    with node.graph.inserting_before(node):
        scattered = node.graph.call_function(aten.slice_scatter.default, (base, source, *piece.args[1:]))
    scattered.meta = dict(base.meta)
    _rename_after(base, scattered)
    node.graph.erase_node(node)
    node.graph.erase_node(piece)
    return True


def _assign_to_indices(node: Node) -> bool:
    """`x[:, i] = y` becomes `index_put`, so that what is in x can be seen from its operands.

    Sliding caches that are full write a step's keys so (`StaticSlidingWindowLayer` of transformers).
    """
    base = _written_through_slice(node) if node.target is aten.index_put_.default else None
    if base is None:
        return False
    piece = node.args[0]
    assert isinstance(piece, Node)
    is_whole = all(map(same_size, shape_of(piece), shape_of(base)))
    if not is_whole or any(is_view(user) for user in base.users if user is not piece):
        return False
    node.target, node.args, node.meta = aten.index_put.default, (base, *node.args[1:]), dict(base.meta)
    _rename_after(base, node)
    node.graph.erase_node(piece)
    return True


def _written_through_slice(node: Node) -> Node | None:
    """The tensor of the graph's own that `node` writes into through a slice which nothing else reads."""
    piece = node.args[0]
    if node.users or not isinstance(piece, Node) or piece.target is not aten.slice.Tensor or set(piece.users) != {node}:
        return None
    base = piece.args[0]
    assert isinstance(base, Node)
    return base if _owns_memory(base) else None


def _assign_to_whole(node: Node) -> bool:
    """After `x.copy_(y)` on all of x, y is read in its place: so end collectives that work in place."""
    operands = _whole_copy(node)
    if operands is None:
        return False
    base, source = operands
    if not _owns_memory(base) or any(map(is_view, base.users)):
        return False
    for user in [user for user in base.users if user > node]:
        user.replace_input_with(base, source)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return True


def _without_mutation(node: Node) -> bool:
    """`add_` becomes `add` where nothing reads the overwritten tensor afterwards."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    name, source = target.overloadpacket.__name__, node.args[0] if node.args else None
    pure = getattr(aten, name.rstrip("_"), None)
    if target.namespace != "aten" or not name.endswith("_") or pure is None or not isinstance(source, Node):
        return False
    if target._overloadname not in pure.overloads() or not _owns_memory(source) or _has_users_after(source, node):
        return False
    node.target = getattr(pure, target._overloadname)
    return True


def _read_back_what_was_written(node: Node) -> bool:
    """A model's argument that was written into is read from the write, so that what is in it can be seen.

    Static caches write keys into their buffers and hand on the buffers.
    """
    target = node.target
    if target is not aten.index_copy_.default or not isinstance(node.args[0], Node) or node.args[0].op != "placeholder":
        return False
    _rename_after(node.args[0], node)
    return True


def _read_new_keys_of_fresh_slots(node: Node) -> bool:
    """Of a static cache that this graph allocates, transformers reads the first slots: the keys just written there.

    It does so where it needs no mask, as the cache was empty (`sdpa_attention_forward` of transformers).
    """
    if node.target is not aten.slice.Tensor or not isinstance(node.args[0], Node):
        return False
    write = node.args[0]
    while write.target is aten.slice.Tensor and write.meta["val"].shape == write.args[0].meta["val"].shape:  # type: ignore[union-attr]
        write = write.args[0]  # type: ignore[assignment]
    if write.target is not aten.index_copy.default or write.args[0].target is not aten.zeros.default:  # type: ignore[union-attr]
        return False
    new, dim, start = write.args[3], write.args[1], node.args[2] if len(node.args) > 2 else None
    assert isinstance(new, Node) and isinstance(dim, int)
    sizes = zip(node.meta["val"].shape, new.meta["val"].shape, strict=True)
    if node.args[1] != dim or start != 0 or not all(same_size(*pair) for pair in sizes):
        return False
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _write_to_input_last(node: Node) -> bool:
    """All of a model's argument is overwritten at the end of the graph; until then what it gets is read in its place.

    Sliding caches that are full make room so. The passes copy what read the old keys, and their copies stand behind
    the place where the model wrote; `run_passes` puts the write behind the last of them.
    """
    operands = _whole_copy(node)
    if operands is None:
        return False
    base, source = operands
    if base.op != "placeholder" or _reads_through_views(base, node):
        return False
    for user in [user for user in (*base.users, *node.users) if user > node and user.op != "output"]:
        user.replace_input_with(base, source)
        user.replace_input_with(node, source)
    next(iter(node.graph.find_nodes(op="output"))).prepend(node)
    return True


def _whole_copy(node: Node) -> tuple[Node, Node] | None:
    """The operands of `base.copy_(source)` that overwrites all of `base`, in its dtype; None for any other node."""
    if node.target is not aten.copy_.default:
        return None
    base, source = node.args[:2]
    if not isinstance(base, Node) or not isinstance(source, Node):
        return None
    before, after = base.meta["val"], source.meta["val"]
    alike = before.dtype == after.dtype and before.dim() == after.dim()
    return (base, source) if alike and all(map(same_size, before.shape, after.shape)) else None


def _reads_through_views(base: Node, place: Node) -> bool:
    """Whether behind `place` anything reads `base` through a view that was made ahead of it."""
    views = [user for user in base.users if is_view(user) and user < place]
    return any(_has_users_after(view, place) or _reads_through_views(view, place) for view in views)


def _owns_memory(node: Node) -> bool:
    """Whether nothing but this node's own users can see its memory."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or is_view(node):
        return False
    return all(result.alias_info is None for result in target._schema.returns)


def _has_users_after(node: Node, place: Node) -> bool:
    return any(user is not place and user > place for user in node.users)


def _rename_after(old: Node, new: Node) -> None:
    """Users of `old` that come after `new` read `new` instead."""
    for user in [user for user in old.users if user > new]:
        user.replace_input_with(old, new)


NORMALISATIONS = (
    _drop_empty_from_cat,
    _lay_out_slice,
    _spell_type_as_cast,
    _assign_to_slice,
    _assign_to_indices,
    _assign_to_whole,
    _without_mutation,
    _read_back_what_was_written,
    _write_to_input_last,
    _read_new_keys_of_fresh_slots,
)


def parameter_values(program: Program, inputs: Sequence[Any]) -> Mapping[str, torch.Tensor]:
    """The real parameters among a graph's inputs, by name."""
    placeholders = program.placeholders()
    return {
        program.parameters[node]: value
        for node, value in zip(placeholders, inputs, strict=False)
        if node in program.parameters and isinstance(value, torch.Tensor)
    }


def input_embedding(model: nn.Module) -> Any:
    """The module that turns token ids into the first residual stream; None where transformers doesn't know it."""
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
