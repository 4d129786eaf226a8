"""Flow-head policies for Stable-Baselines3: encoder, flow head, and the samplers around them."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import (
    is_image_space,
    is_image_space_channels_first,
    preprocess_obs,
)
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from fagrpo.encoders import FlowObservationEncoder
from fagrpo.flow_head import MlpFlowHead
from fagrpo.flow_sde import FlowChain, sample_chain

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
EXPORT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _channels_first(space: spaces.Space) -> spaces.Space:
    """The space with channels-last images transposed, as SB3's VecTransposeImage presents it to a policy."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _channels_first(entry) for key, entry in space.spaces.items()})
    if isinstance(space, spaces.Box) and is_image_space(space) and not is_image_space_channels_first(space):
        height, width, channels = space.shape
        return spaces.Box(0, 255, (channels, height, width), np.uint8)
    return space


class FlowPolicy(BasePolicy):
    """A policy that samples its action with a flow: noise is carried to an action (chunk) in K steps.

    The flow lives in normalised action units, ``action = mean + std * x``; the statistics are stored in the policy and
    begin as the middle and half the range of the action space. Actions are clipped to the space only by
    :meth:`predict` and when they are sent to an environment, never inside the flow.

    :param observation_space: Box or Dict of Boxes; channels-last images are accepted and transposed
    :param action_space: Box of any shape with finite bounds
    :param lr_schedule: learning rate as a function of the remaining progress
    :param num_flow_steps: K, of both the sampler and the SDE
    :param time_shift: of the time grid, 1 is uniform
    :param observation_keys: entries of a Dict observation that the policy sees; None: all
    :param features_extractor_class: encoder, ``(observation_space, **features_extractor_kwargs)``
    :param features_extractor_kwargs: its arguments
    :param flow_head_class: a :class:`FlowHead` module, ``(action_shape, context_dim, **flow_head_kwargs)``
    :param flow_head_kwargs: its arguments
    :param normalize_images: whether uint8 images are divided by 255
    :param optimizer_class: AdamW by default
    :param optimizer_kwargs: its arguments, without the learning rate
    :raises ValueError: an action space that is not a bounded Box, or K < 1
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule = BasePolicy._dummy_schedule,
        *,
        num_flow_steps: int = 10,
        time_shift: float = 1.0,
        observation_keys: Sequence[str] | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] = FlowObservationEncoder,
        features_extractor_kwargs: dict[str, Any] | None = None,
        flow_head_class: Callable[..., nn.Module] = MlpFlowHead,
        flow_head_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(action_space, spaces.Box) or not np.isfinite([action_space.low, action_space.high]).all():
            raise ValueError(f"FlowPolicy needs a Box action space with finite bounds, got {action_space}")
        if num_flow_steps < 1:
            raise ValueError(f"num_flow_steps must be at least 1, got {num_flow_steps}")
        if optimizer_kwargs is None:
            optimizer_kwargs = {"weight_decay": 0.0} if optimizer_class is torch.optim.AdamW else {}
        self._constructor: dict[str, Any] = {
            "num_flow_steps": num_flow_steps,
            "time_shift": time_shift,
            "observation_keys": None if observation_keys is None else list(observation_keys),
            "features_extractor_class": features_extractor_class,
            "features_extractor_kwargs": dict(features_extractor_kwargs or {}),
            "flow_head_class": flow_head_class,
            "flow_head_kwargs": dict(flow_head_kwargs or {}),
            "normalize_images": normalize_images,
            "optimizer_class": optimizer_class,
            "optimizer_kwargs": dict(optimizer_kwargs),
        }
        constructor = self._constructor
        super().__init__(
            _channels_first(observation_space),
            action_space,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=dict(features_extractor_kwargs or {}),
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=False,
        )
        self._constructor = constructor
        self.num_flow_steps = num_flow_steps
        self.time_shift = time_shift
        self.action_shape: tuple[int, ...] = action_space.shape
        if issubclass(features_extractor_class, FlowObservationEncoder):
            if observation_keys is not None:
                self.features_extractor_kwargs["observation_keys"] = list(observation_keys)
            self.features_extractor = self.make_features_extractor()
        else:  # an encoder of your own is made for the entries that it will be given
            self.features_extractor = features_extractor_class(self.used_space, **self.features_extractor_kwargs)
        self.flow_head = flow_head_class(
            self.action_shape, self.features_extractor.features_dim, **dict(flow_head_kwargs or {})
        )
        low, high = torch.as_tensor(action_space.low).float(), torch.as_tensor(action_space.high).float()
        self.register_buffer("action_mean", (low + high) / 2)
        self.register_buffer("action_std", ((high - low) / 2).clamp(min=1e-6))
        self.action_mean: Tensor
        self.action_std: Tensor
        # Learning rates are set by the algorithm before each update.
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1.0), **self.optimizer_kwargs)  # type: ignore[call-arg]

    # ---- observations and actions

    @property
    def used_space(self) -> spaces.Space:
        """The part of the observation space that the policy sees, see ``observation_keys``."""
        keys = self._constructor["observation_keys"]
        if keys is None or not isinstance(self.observation_space, spaces.Dict):
            return self.observation_space
        return spaces.Dict({key: self.observation_space[key] for key in keys})

    def obs_to_tensor(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """As SB3's; entries of a dict that the policy does not see are left out, and need not be there.

        :raises ValueError: an entry that the policy sees is missing
        """
        if isinstance(observation, dict) and isinstance(self.used_space, spaces.Dict):
            if missing := [key for key in self.used_space if key not in observation]:
                raise ValueError(f"the policy sees {list(self.used_space)}, the observation lacks {missing}")
            observation = {key: observation[key] for key in self.used_space}
        return super().obs_to_tensor(observation)

    def encode(self, obs: PyTorchObs, min_rows: int = 1) -> Tensor:
        """Context of a batch of observations, computed once for all flow steps.

        :param obs: tensor or dict of tensors as the environment gives them (uint8 images, channels first or last)
        :param min_rows: a smaller batch is filled up for the computation, so that it is rounded like a larger one
        :return: (B, C)
        """
        obs = self._transpose_images(obs)
        rows = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
        if isinstance(obs, dict):
            obs = {key: _fill_up(value, min_rows) for key, value in obs.items()}
        else:
            obs = _fill_up(obs, min_rows)
        prepared = preprocess_obs(self._used(obs), self.used_space, normalize_images=self.normalize_images)
        context: Tensor = self.features_extractor(prepared)
        return context[:rows]

    def _used(self, obs: PyTorchObs) -> PyTorchObs:
        keys = self._constructor["observation_keys"]
        return {key: obs[key] for key in keys} if isinstance(obs, dict) and keys is not None else obs

    def _transpose_images(self, obs: PyTorchObs) -> PyTorchObs:
        if isinstance(obs, dict):
            assert isinstance(self.observation_space, spaces.Dict)
            return {key: _to_channels_first(value, self.observation_space[key]) for key, value in obs.items()}
        return _to_channels_first(obs, self.observation_space)

    def normalize_action(self, action: Tensor) -> Tensor:
        """Environment units -> flow units, (B, \\*A)."""
        return (action.float() - self.action_mean) / self.action_std

    def unnormalize_action(self, x: Tensor) -> Tensor:
        """Flow units -> environment units, (B, \\*A), not clipped."""
        return self.action_mean + self.action_std * x

    def clip_action(self, action: np.ndarray) -> np.ndarray:
        """Limit actions (B, \\*A) to the action space, just before they are sent to an environment."""
        assert isinstance(self.action_space, spaces.Box)
        return np.clip(action, self.action_space.low, self.action_space.high).astype(self.action_space.dtype)

    def set_action_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the action statistics of the training data.

        :param mean: (\\*A) in environment units
        :param std: (\\*A); at least 1% of half the action range is used, so that no dimension is left without
            noise, and 1e-6 where there is no range
        """
        assert isinstance(self.action_space, spaces.Box)
        half_range = (
            torch.as_tensor((self.action_space.high - self.action_space.low) / 2).float().to(self.action_std.device)
        )
        self.action_mean.copy_(mean)
        least = (0.01 * half_range).clamp(min=1e-6)
        self.action_std.copy_(torch.maximum(std.to(self.action_std.device), least))

    # ---- the flow

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor, min_rows: int = 1) -> Tensor:
        """v(x_t, t, context): x_t (B, \\*A), t (B,), context (B, C) -> float32 (B, \\*A); min_rows as in `encode`."""
        velocity: Tensor = self.flow_head(*(_fill_up(value, min_rows) for value in (x_t, t, context)))
        return velocity[: len(x_t)].float()

    def sample(
        self,
        obs: PyTorchObs,
        noise_level: float,
        schedule: str = "flow",
        generator: torch.Generator | None = None,
        sde_steps: Sequence[int] | None = None,
        min_rows: int = 1,
    ) -> FlowChain:
        """Sample a chain per observation with the SDE sampler, in flow units.

        :param obs: a batch of observations, B rows
        :param noise_level: a; 0 is the ODE sampler with random initial noise
        :param schedule: "flow" or "constant"
        :param generator: of the initial noise and the transitions; None: torch's global one
        :param sde_steps: stochastic flow steps; None: all
        :param min_rows: as in :meth:`encode`; scoring must use the same
        :return: chain of B rows, in flow units: act with ``unnormalize_action(chain.sample)``
        """
        with torch.no_grad():
            context = self.encode(obs, min_rows)
            noise_device = context.device if generator is None else generator.device
            noise = torch.randn((len(context), *self.action_shape), generator=generator, device=noise_device).to(
                context.device
            )
            return sample_chain(
                lambda x, t: self.velocity(x, t, context, min_rows),
                noise,
                self.num_flow_steps,
                noise_level,
                schedule,
                generator,
                sde_steps,
                self.time_shift,
            )

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        context = self.encode(observation)
        shape = (len(context), *self.action_shape)
        # Deterministic: from the middle of the noise, the likeliest one.
        noise = (torch.zeros if deterministic else torch.randn)(shape, device=context.device)
        chain = sample_chain(
            lambda x, t: self.velocity(x, t, context), noise, self.num_flow_steps, 0.0, shift=self.time_shift
        )
        return self.unnormalize_action(chain.sample)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Actions (B, \\*A) in environment units, not clipped."""
        return self._predict(obs, deterministic)

    # ---- files

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {"observation_space": self.observation_space, "action_space": self.action_space, **self._constructor}

    @property
    def constructor_kwargs(self) -> dict[str, Any]:
        """The keyword arguments that rebuild this policy (``policy_kwargs`` of an algorithm)."""
        return {key: value.copy() if isinstance(value, dict) else value for key, value in self._constructor.items()}

    def export_safetensors(self, path: str | Path, dtype: str = "float32") -> None:
        """Write the policy to a folder as ``config.json`` and ``model.safetensors``: no pickle, readable anywhere.

        Each file is written to a temporary name and renamed.

        :param path: folder, created if needed
        :param dtype: of the stored floating-point weights: "float32", "float16" or "bfloat16"; statistics keep float32
        :raises ValueError: another dtype, or arguments that JSON cannot hold
        """
        if dtype not in EXPORT_DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(EXPORT_DTYPES)}")
        arguments = self.constructor_kwargs
        classes = {name: arguments.pop(name).__name__ for name in ("features_extractor_class", "flow_head_class")}
        for name in ("optimizer_class", "optimizer_kwargs"):
            arguments.pop(name)
        config = {
            "class": type(self).__name__,
            **classes,
            "observation_space": _space_to_json(self.observation_space),
            "action_space": _space_to_json(self.action_space),
            "arguments": arguments,
        }
        try:
            text = json.dumps(config, indent=2)
        except TypeError as error:
            raise ValueError(f"the policy's arguments are not plain JSON values: {error}") from error
        weights_of = dict(self.named_parameters())
        tensors = {
            key: (value.to(EXPORT_DTYPES[dtype]) if key in weights_of else value).detach().cpu().contiguous()
            for key, value in self.state_dict().items()
        }
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights, configuration = folder / f"{WEIGHTS_NAME}.tmp", folder / f"{CONFIG_NAME}.tmp"
        save_file(tensors, weights, metadata={"format": "pt", "dtype": dtype})
        weights.chmod(0o644)  # safetensors makes files that only their owner can read
        configuration.write_text(text + "\n", encoding="utf-8")
        os.replace(weights, folder / WEIGHTS_NAME)
        os.replace(configuration, folder / CONFIG_NAME)

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        features_extractor_class: type[BaseFeaturesExtractor] = FlowObservationEncoder,
        flow_head_class: Callable[..., nn.Module] = MlpFlowHead,
    ) -> Self:
        """Rebuild a policy from a folder that :meth:`export_safetensors` wrote; weights come back as float32.

        :param path: the folder
        :param device: where to put it
        :param features_extractor_class: the encoder that it was made with, if that was your own
        :param flow_head_class: the head that it was made with, if that was your own
        :raises FileNotFoundError: config or weights are missing
        :raises ValueError: a config or a weights file that is damaged or does not belong together, or a policy of
            another class that this one does not inherit from
        """
        folder = Path(path)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} does not exist; expected a folder written by export_safetensors"
                )
        try:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            classes: dict[str, Any] = {
                "features_extractor_class": features_extractor_class,
                "flow_head_class": flow_head_class,
            }
            if (made := config["class"]) not in (parent.__name__ for parent in cls.__mro__):
                raise ValueError(f"{folder} was exported by a {made}: load it with {made}.from_safetensors")
            for name, given in classes.items():
                if config.get(name, given.__name__) != given.__name__:
                    raise ValueError(f"{folder} was exported with {name} {config[name]}: pass {name}={config[name]}")
            policy = cls(
                _space_from_json(config["observation_space"]),
                _space_from_json(config["action_space"]),
                **config["arguments"],
                **classes,
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / CONFIG_NAME} is not a policy config: {error!r}; export the policy again"
            ) from error
        try:
            with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / WEIGHTS_NAME} is damaged or truncated: {error}; export the policy again"
            ) from error
        try:
            policy.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS_NAME} does not fit {folder / CONFIG_NAME}: {error}") from error
        if not all(bool(torch.isfinite(value).all()) for value in policy.state_dict().values()):
            raise ValueError(f"{folder / WEIGHTS_NAME} holds NaN or infinite weights")
        return policy.to(device)


def average_policies(policies: Sequence[FlowPolicy]) -> FlowPolicy:
    """A policy whose weights are the mean of those of policies that were all fine-tuned from one: a model soup
    (Wortsman et al. 2022, arXiv 2203.05482).

    Seeds of one post-training have in common what pays, and each has found errors of the simulator of its own.
    Checkpoints of one run differ by the noise of its updates.

    :param policies: one or more, of the same spaces (whatever the bounds of observations) and make; they stay as they
        are
    :return: a new policy, on the CPU
    :raises ValueError: no policy, or policies of different makes
    """
    if not policies:
        raise ValueError("nothing to average: give at least one policy")
    makes = [_make(policy) for policy in policies]
    for index, make in enumerate(makes):
        if make != makes[0]:
            raise ValueError(
                f"policies 0 and {index} differ in spaces or make: average what was fine-tuned from one policy"
            )
    first, states = policies[0], [policy.state_dict() for policy in policies]
    average = type(first)(first.observation_space, first.action_space, **first.constructor_kwargs)
    average.load_state_dict(
        {key: torch.stack([state[key].cpu().double() for state in states]).mean(0) for key in states[0]}
    )
    return average


def _make(policy: FlowPolicy) -> tuple[Any, ...]:
    shapes = {key: value.shape for key, value in policy.state_dict().items()}
    return type(policy), shapes, policy.action_space, policy.constructor_kwargs


def _fill_up(value: Tensor, min_rows: int) -> Tensor:
    """Repeat the last row until there are min_rows."""
    missing = min_rows - len(value)
    return value if missing <= 0 else torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])


def _to_channels_first(value: Tensor, space: spaces.Space) -> Tensor:
    if is_image_space(space) and value.shape[1:] != space.shape and value.permute(0, 3, 1, 2).shape[1:] == space.shape:
        return value.permute(0, 3, 1, 2)
    return value


def _space_to_json(space: spaces.Space) -> dict[str, Any]:
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: _space_to_json(entry) for key, entry in space.spaces.items()}}
    if not isinstance(space, spaces.Box):
        raise ValueError(f"only Box and Dict spaces can be exported, got {space}")
    bounds = {
        name: float(values.flat[0]) if (values == values.flat[0]).all() else values.tolist()
        for name, values in (("low", space.low), ("high", space.high))
    }
    return {"type": "Box", **bounds, "shape": list(space.shape), "dtype": np.dtype(space.dtype).name}


def _space_from_json(data: dict[str, Any]) -> spaces.Space:
    if data["type"] == "Dict":
        return spaces.Dict({key: _space_from_json(entry) for key, entry in data["spaces"].items()})
    dtype = np.dtype(data["dtype"])
    low, high = (np.broadcast_to(np.asarray(data[name], dtype=dtype), data["shape"]) for name in ("low", "high"))
    return spaces.Box(low, high, dtype=dtype.type)
