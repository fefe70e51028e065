"""transformers' `Trainer` with the job's optimizer and schedule.

- The optimizer is that of the job's `optimizer` part; transformers makes those that it knows.
- The learning rate is a function of how much of the training is done, so it needs no step total and no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from rayloom.methods.optimizers.badam import BAdam
from rayloom.methods.optimizers.build import Setting, library_class, lora_plus, make_optimizer
from rayloom.train.own_settings import OwnSettings
from rayloom.train.schedule import ProgressSchedule


class WhenWrapped(transformers.TrainerCallback):
    """Calls what must wait until the model is wrapped for training and the checkpoint is loaded."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._call()


class OptimizerTrainer(transformers.Trainer):
    """Makes what changes the weights."""

    _optimizer_config: Any
    """The job's `optimizer` part."""
    _schedule: ProgressSchedule | None = None
    trained: list[torch.nn.Parameter]
    """By the method and the optimizer; BAdam's at any time."""

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer of the job, over what trains."""
        if self.optimizer is None:
            model, config = model or self.model, self._optimizer_config
            decayed = self.get_decay_parameter_names(model)
            setting = Setting(model, self.args.learning_rate, self.args.weight_decay, decayed, self.args.seed)
            self.optimizer = make_optimizer(config, setting)
            if self.optimizer is None and getattr(config, "lora_plus_ratio", None) is not None:
                self.optimizer = lora_plus(config, self.args, model)
            if self.optimizer is None:
                self.optimizer_cls_and_kwargs = library_class(config, self.args, model)
                super().create_optimizer(model)
            self.trained = [weight for weight in model.parameters() if weight.requires_grad]
            self._arrange(self.optimizer)
            self.add_callback(OwnSettings(self.optimizer))
            if isinstance(self.optimizer, BAdam):
                self.add_callback(WhenWrapped(self.optimizer.begin))
        return self.optimizer

    def _arrange(self, optimizer: Any) -> None:
        """See to an optimizer that has just been made and has no state yet."""

    def _use_averages(self) -> None:
        """Schedule-free optimizers train at other weights than those to use; the next step changes back."""
        if self._optimizer_config.type.startswith("schedule_free"):
            optimizer: Any = self.optimizer
            optimizer.eval()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self._schedule = ProgressSchedule(optimizer or self.optimizer, self.args.learning_rate)
        self.lr_scheduler: Any = self._schedule
        self._created_lr_scheduler = True
        return self._schedule
