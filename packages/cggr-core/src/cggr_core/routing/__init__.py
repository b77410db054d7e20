"""Engines that run kept tokens through a stock Hugging Face model; the one place that imports transformers.

The names below are what the other packages may import from here. Of core besides, they may import the names of
``cggr_core`` itself, and those of its modules ``settings``, ``checks``, ``backends``, ``monitor``, ``stopwatch``,
``step``, ``logprobs`` and ``experimental``. Everything else is core's own, and may change in any release.

============================  =========================================================================================
name                          what it promises
============================  =========================================================================================
:class:`Engine`               the passes over one model: ``inputs``, ``prepare``, ``plain``, ``context``, ``gradient``
:class:`Head`                 what a model does between its last hidden state and its logits
:class:`TokenInputs`          a checked batch, as :meth:`Engine.inputs` makes it
:class:`Shared`               a prompt's keys and values, shared by rows that go on from it
:class:`Context`              what a context pass left; :data:`NO_CONTEXT` stands for none
:func:`fused_forwards`        forwards to run in place of a model's norms, attentions and MLPs
:func:`forward_replaced_by`   a call of a module that is a call of something else, in which the module is itself again
:func:`replaced_forwards`     modules with another ``forward`` for the length of a block
:func:`replaced_parameters`   modules that find other parameters in place of theirs for the length of a block
:func:`without_hooks`         a module without its hooks for the length of a block, to be called inside its own call
:func:`shards_layers`        whether ``fully_shard`` was applied to layers, so that every pass of one is a collective
:func:`whole_rows`            no look at positions, and no needless mask, for the length of a block
:func:`unwrapped`             the Hugging Face model inside a PEFT wrapper
============================  =========================================================================================
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "routing through a model needs transformers >= 5.17: python -m pip install 'transformers>=5.17'"
    ) from error

from cggr_core.routing.architectures import Head, unwrapped
from cggr_core.routing.context_pass import NO_CONTEXT, Context
from cggr_core.routing.engine import Engine
from cggr_core.routing.fusions import fused_forwards
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.masks import whole_rows
from cggr_core.routing.patches import forward_replaced_by, replaced_forwards, replaced_parameters, without_hooks
from cggr_core.routing.sharding import shards_layers
from cggr_core.routing.shared import Shared

__all__ = [
    "NO_CONTEXT",
    "Context",
    "Engine",
    "Head",
    "Shared",
    "TokenInputs",
    "forward_replaced_by",
    "fused_forwards",
    "replaced_forwards",
    "replaced_parameters",
    "shards_layers",
    "unwrapped",
    "whole_rows",
    "without_hooks",
]
