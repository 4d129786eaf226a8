"""FA-GRPO: group-relative policy optimisation of flow-head policies, as a Stable-Baselines3 algorithm."""

import copy
import io
import math
import os
import pathlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fagrpo.demonstrations import Demonstrations
from fagrpo.flow_scale import equalizing_weights, flow_scale_weights
from fagrpo.flow_sde import (
    SCHEDULES,
    FlowChain,
    chain_means,
    gaussian_kl,
    log_prob_difference,
    transition_coefficients,
)
from fagrpo.imitation import DemonstrationTensors, flow_matching_loss
from fagrpo.objective import PLACEMENTS, RATIOS, aggregate_log_ratio, clipped_objective
from fagrpo.policies import FlowPolicy
from fagrpo.rollout_buffer import ADVANTAGES, GroupRolloutBuffer, GroupRolloutSamples

FLOW_SCALES = ("none", "paper", "equalizing")
RATIO_TOLERANCE = 1e-5
MIN_ROWS = 16
"""Sampling and scoring never compute fewer rows at a time: libraries round products of fewer rows differently, and over
hundreds of dimensions times flow steps the ratio would show it."""


def _pause(env: VecEnv, rows: np.ndarray) -> None:
    """Tell a VecEnv that computes all its robots in one call which of them nobody waits for."""
    if hasattr(env.unwrapped, "paused"):
        env.unwrapped.paused = rows


def _layout(space: spaces.Space) -> Any:
    """Shapes and dtypes of an observation space, without its bounds."""
    if isinstance(space, spaces.Dict):
        return {key: _layout(entry) for key, entry in space.items()}
    return space.shape, space.dtype


class FAGRPO(OnPolicyAlgorithm):
    """Flow-action GRPO (Reinforcing Action Policies by Prophesying, arXiv 2511.20633) for policies whose action is
    sampled by a flow.

    The flow's ODE sampler becomes an SDE, so that each of its K steps is Gaussian; the probability of an environment
    action is the product over its flow steps. G rollouts from one start form a group, whose normalised returns are the
    advantages: no critic. One update maximises, over rollouts i and steps s,

        mean_{i,s} min(r A, clip(r, 1 - low, 1 + high) A) - kl_coef KL(pi || pi_ref),   r = exp(sum_k log-ratio of flow
        step k)

    With a VecEnv of n_envs environments, each group of ``group_size`` neighbouring ones is reset with one seed, or with
    the same options (``group_options``). With fewer environments than a group, the group is collected in several
    rounds, down to consecutive episodes of a single environment. While the last episodes of a rollout end, the other
    environments idle; a VecEnv that itself has an attribute ``paused``, bool (n_envs,), is told which. Rewards are
    taken as the environments give them, also behind ``VecNormalize``, whose running scale would make equal returns
    differ; group normalisation does the scaling.

    :param policy: "FlowPolicy" or "FlowMultiInputPolicy", a FlowPolicy class, or a FlowPolicy instance (say, a cloned
        one), whose settings and weights are copied
    :param env: an SB3 VecEnv, a Gymnasium env, or an id; the action space is a bounded Box of any shape. If info has
        "executed_actions" (int n), only the first n actions of the chunk (first axis of the action) are scored.
    :param learning_rate: float, or a function of the remaining progress (1 to 0)
    :param group_size: G, rollouts per start
    :param n_groups: starts per rollout; n_groups * group_size must be a multiple of n_envs. None: as few as fill the
        environments
    :param n_steps: None: a rollout is one whole episode per group member. An int: exactly n_steps steps per
        environment, as SB3's other algorithms; environments of a group begin together, later episodes are compared by
        their number, and episodes cut off by the end are left out unless they are an environment's first. Where
        group_size does not divide the number of environments, the last group is smaller.
    :param max_episode_steps: episodes are cut here when n_steps is None
    :param group_options: draws the reset options of a group: a function of a ``numpy.random.Generator``, which belongs
        to the model. All environments of the group are reset with these options (``VecEnv.set_options``) and each with
        a seed of its own, so that they share the start that the options name and nothing else. None: no options, one
        seed per group. Not with n_steps, whose later episodes the environments begin by themselves.
    :param batch_size: environment actions per optimiser step; None: all of a rollout
    :param micro_batch_size: actions per forward-backward pass, gradients are accumulated over a batch; None: batch_size
    :param n_epochs: passes over a rollout
    :param gamma: discount of rewards
    :param advantage: "episode" or "step", see :meth:`fagrpo.rollout_buffer.GroupRolloutBuffer.finish`
    :param advantage_eps: added to the standard deviation of a group's returns
    :param ratio: "chunk", "dim" or "flow_step", see :func:`fagrpo.objective.aggregate_log_ratio`
    :param clip_range: lower clip range, float or schedule; also the upper one unless that is given
    :param clip_range_high: upper clip range, float or schedule
    :param dual_clip: bound for negative advantages, > 1; None: off
    :param kl_coef: weight of the KL to the reference policy, a copy made when learning first begins; 0: no reference
    :param target_kl: stop the epochs of an update beyond 1.5 times this approximate KL (to the policy that collected)
    :param flow_scale: "none", "paper" (:func:`fagrpo.flow_scale.flow_scale_weights`) or "equalizing"; the mean weight
        is 1 over all flow steps, those outside an ``sde_window`` among them
    :param flow_scale_kwargs: exponent, eps, blend, w_min, w_max of the paper's weights
    :param flow_scale_placement: "advantage" or "log_prob", see :func:`fagrpo.objective.aggregate_log_ratio`
    :param noise_level: a of the SDE, > 0
    :param noise_schedule: "flow" or "constant", see :func:`fagrpo.flow_sde.transition_coefficients`
    :param sde_window: number of consecutive stochastic flow steps, placed at random in each rollout; None: all are
        stochastic
    :param action_mask: bool array of the action's shape, False for padding dimensions, which are not scored
    :param bc_coef: weight of a flow-matching loss on ``demonstrations``; 0: off
    :param demonstrations: for bc_coef; not saved with the model. Their observations are the environment's own: not
        together with a ``VecNormalize`` of observations
    :param ema_decay: decay of an exponential moving average of the policy's weights, in [0, 1), one step per rollout
        that was learned from: :attr:`average_policy`, in which the noise of single updates has averaged out. It spans
        about 1 / (1 - ema_decay) rollouts. 0: none
    :param max_grad_norm: gradient clipping
    :param stats_window_size: episodes over which SB3's statistics (rollout/success_rate, ...) are averaged. None: with
        whole episodes those of one rollout, for the last to end are not like the others; with n_steps 100
    :param tensorboard_log: folder, or None
    :param policy_kwargs: of the policy class
    :param verbose: 0, 1 (info) or 2
    :param seed: of everything random
    :param device: "auto", "cpu", "cuda", ...
    :param _init_setup_model: build the network now
    :raises ValueError: unknown choices (listed), values out of range, environments that do not fit the groups
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "FlowPolicy": FlowPolicy,
        "FlowMultiInputPolicy": FlowPolicy,
    }
    policy: FlowPolicy  # type: ignore[assignment]
    rollout_buffer: GroupRolloutBuffer  # type: ignore[assignment]
    n_steps: int | None  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[FlowPolicy] | FlowPolicy,
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 5e-5,
        group_size: int = 8,
        n_groups: int | None = None,
        n_steps: int | None = None,
        max_episode_steps: int = 1000,
        group_options: Callable[[np.random.Generator], dict[str, Any]] | None = None,
        batch_size: int | None = 256,
        micro_batch_size: int | None = None,
        n_epochs: int = 2,
        gamma: float = 1.0,
        advantage: str = "episode",
        advantage_eps: float = 1e-6,
        ratio: str = "chunk",
        clip_range: float | Schedule = 0.2,
        clip_range_high: float | Schedule | None = None,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        target_kl: float | None = None,
        flow_scale: str = "paper",
        flow_scale_kwargs: dict[str, float] | None = None,
        flow_scale_placement: str = "advantage",
        noise_level: float = 0.5,
        noise_schedule: str = "flow",
        sde_window: int | None = None,
        action_mask: np.ndarray | None = None,
        bc_coef: float = 0.0,
        demonstrations: Demonstrations | None = None,
        ema_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        stats_window_size: int | None = None,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if bc_coef > 0 and demonstrations is None:
            raise ValueError("bc_coef > 0 needs demonstrations")
        initial_policy: FlowPolicy | None = None
        policy_class: str | type[FlowPolicy]
        if isinstance(policy, str | type):
            if isinstance(policy, str) and policy not in self.policy_aliases:
                raise ValueError(
                    f"unknown policy {policy!r}; choose one of {', '.join(self.policy_aliases)}, or pass a FlowPolicy"
                )
            policy_class = policy
        else:
            if policy_kwargs is not None:
                raise ValueError("policy_kwargs come with the policy when an instance is given; pass one or the other")
            if not isinstance(policy, FlowPolicy):
                raise TypeError(f"policy must be a FlowPolicy, its class or its name, got a {type(policy).__name__}")
            initial_policy = cast(FlowPolicy, policy)
            policy_class, policy_kwargs = type(initial_policy), initial_policy.constructor_kwargs
        super().__init__(
            policy_class,  # type: ignore[arg-type]
            env,  # type: ignore[arg-type]  # None when a model is loaded without one
            learning_rate=learning_rate,
            n_steps=n_steps or 1,
            gamma=gamma,
            gae_lambda=1.0,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            stats_window_size=stats_window_size or 100,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box,),
        )
        self.n_steps = n_steps
        self.group_size = group_size
        self.n_groups = n_groups
        self.stats_window_size = stats_window_size
        self.max_episode_steps = max_episode_steps
        self.group_options = group_options
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.n_epochs = n_epochs
        self.advantage = advantage
        self.advantage_eps = advantage_eps
        self.ratio = ratio
        self.clip_range = clip_range
        self.clip_range_high = clip_range_high
        self.dual_clip = dual_clip
        self.kl_coef = kl_coef
        self.target_kl = target_kl
        self.flow_scale = flow_scale
        self.flow_scale_kwargs: dict[str, float] = dict(flow_scale_kwargs or {})
        self.flow_scale_placement = flow_scale_placement
        self.noise_level = noise_level
        self.noise_schedule = noise_schedule
        self.sde_window = sde_window
        self.action_mask = action_mask
        self.bc_coef = bc_coef
        self.demonstrations = demonstrations
        self.ema_decay = ema_decay
        self._bc_data: DemonstrationTensors | None = None
        self._ema: AveragedModel | None = None
        self.reference_policy: FlowPolicy | None = None
        self._has_reference = False
        self._ratio_checked = False
        self._initial_policy: FlowPolicy | None = initial_policy
        self._random_state: dict[str, Any] | None = None
        self._frozen: list[str] = []  # names of the policy's parameters that do not learn
        self._rollout_start: dict[str, Any] | None = None
        self._lonely_groups = False
        self._starts_checked = False
        if _init_setup_model:
            self._setup_model()

    # ---- set-up

    def _setup_model(self) -> None:
        self.flow_scale_kwargs = self.flow_scale_kwargs or {}
        if self.action_mask is not None:
            self.action_mask = np.asarray(self.action_mask, dtype=bool)
        self._check_settings()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)  # makes _generator and _start_rng
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_high is not None:
            self.clip_range_high = FloatSchedule(self.clip_range_high)

        self.rollout_buffer = GroupRolloutBuffer()
        self.policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        )  # type: ignore[assignment]
        if not isinstance(self.policy, FlowPolicy):
            raise TypeError(f"FAGRPO needs a FlowPolicy, got {type(self.policy).__name__}")
        if self._initial_policy is not None:
            self._copy_initial_policy(self._initial_policy)
        self.policy = self.policy.to(self.device)
        if self.ema_decay:
            self._make_average()
        if self._has_reference:
            self._make_reference()
        if self.action_mask is not None and self.action_mask.shape != self.policy.action_shape:
            raise ValueError(f"action_mask has shape {self.action_mask.shape}, actions have {self.policy.action_shape}")
        if self.sde_window is not None and self.sde_window > self.policy.num_flow_steps:
            raise ValueError(
                f"sde_window {self.sde_window} exceeds the policy's {self.policy.num_flow_steps} flow steps"
            )
        if self.env is not None and self.n_steps is None:
            self._count_groups(self.env)

    def _check_settings(self) -> None:
        """Of the constructor, or of `load`, which overrides what was saved."""
        for name, choices in (
            ("ratio", RATIOS),
            ("advantage", ADVANTAGES),
            ("flow_scale", FLOW_SCALES),
            ("flow_scale_placement", PLACEMENTS),
            ("noise_schedule", SCHEDULES),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        for name, least in (
            ("group_size", 2),  # an advantage compares the rollouts of a group
            ("n_groups", 1),
            ("n_steps", 1),
            ("max_episode_steps", 1),
            ("batch_size", 1),
            ("micro_batch_size", 1),
            ("n_epochs", 1),
            ("sde_window", 1),
            ("stats_window_size", 1),
        ):
            if (count := getattr(self, name)) is not None and count < least:
                raise ValueError(f"{name} must be at least {least}, got {count}")
        if not self.noise_level > 0:
            raise ValueError(
                f"noise_level must be positive (an ODE has no probabilities to train on), got {self.noise_level}"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1, got {self.dual_clip}")
        for name in ("kl_coef", "bc_coef", "advantage_eps"):
            if not (number := getattr(self, name)) >= 0:
                raise ValueError(f"{name} must not be negative, got {number}")
        for name in ("clip_range", "clip_range_high", "target_kl", "max_grad_norm"):
            number = getattr(self, name)
            if number is not None and not callable(number) and not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.flow_scale_kwargs:
            if self.flow_scale != "paper":
                raise ValueError(f"flow_scale_kwargs belong to flow_scale='paper', not to {self.flow_scale!r}")
            try:
                flow_scale_weights(torch.ones(1), **self.flow_scale_kwargs)
            except TypeError as error:
                raise ValueError(f"flow_scale_kwargs: {error}; see fagrpo.flow_scale.flow_scale_weights") from error
        if self.group_options is not None and self.n_steps is not None:
            raise ValueError("group_options need whole episodes: leave n_steps out")
        if self.n_groups is not None and self.n_steps is not None:
            raise ValueError("n_groups is for whole episodes: with n_steps, the number of environments sets it")

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed everything random: what SB3 seeds, the flow's noise, the order of minibatches and the groups' starts.

        :param seed: None: from the operating system
        """
        super().set_random_seed(seed)
        torch_seed, start_seed = np.random.SeedSequence(seed).spawn(2)
        self._generator = torch.Generator().manual_seed(int(torch_seed.generate_state(1)[0]))
        self._start_rng = np.random.default_rng(start_seed)

    def _copy_initial_policy(self, initial: FlowPolicy) -> None:
        used, given = initial.used_space, self.observation_space
        if isinstance(used, spaces.Dict) and isinstance(given, spaces.Dict) and not used.keys() <= given.keys():
            raise ValueError(
                f"the given policy looks at {sorted(used.keys() - given.keys())}, which this environment does not "
                f"observe; it has {sorted(given)}"
            )
        # What it does not look at may differ, and so may bounds: a policy cloned from recordings does not know them.
        same_observations = _layout(initial.used_space) == _layout(self.policy.used_space)
        if not same_observations or initial.action_space != self.policy.action_space:
            raise ValueError(
                "the given policy does not fit the environment: it has spaces "
                f"{initial.used_space} -> {initial.action_space}, the environment "
                f"{self.policy.used_space} -> {self.policy.action_space}"
            )
        self.policy.load_state_dict(initial.state_dict())
        for own, given_parameter in zip(self.policy.parameters(), initial.parameters(), strict=True):
            own.requires_grad_(given_parameter.requires_grad)

    def _make_reference(self) -> None:
        self.reference_policy = copy.deepcopy(self.policy)
        self.reference_policy.requires_grad_(False)
        self.reference_policy.set_training_mode(False)
        self._has_reference = True

    def _make_average(self) -> None:
        self._ema = AveragedModel(self.policy, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay))
        self._ema.update_parameters(self.policy)  # the first one copies: the average begins at the policy
        self._ema.requires_grad_(False)
        self._ema.module.set_training_mode(False)

    @property
    def average_policy(self) -> FlowPolicy | None:
        """The policy with the moving average of the weights; None without ``ema_decay``."""
        return None if self._ema is None else cast(FlowPolicy, self._ema.module)

    def _count_groups(self, env: VecEnv) -> int:
        n_groups = self.n_groups or math.lcm(env.num_envs, self.group_size) // self.group_size
        if (n_groups * self.group_size) % env.num_envs:
            raise ValueError(
                f"{n_groups} groups of {self.group_size} rollouts do not divide over {env.num_envs} environments: "
                "set n_groups so that n_groups * group_size is a multiple of n_envs, or leave it out"
            )
        return n_groups

    # ---- collection

    def collect_rollouts(  # type: ignore[override]
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: GroupRolloutBuffer,
        n_rollout_steps: int | None,
    ) -> bool:
        """Collect one rollout: whole episodes (n_rollout_steps None) or a fixed number of steps per environment.

        :return: False if a callback ended training
        """
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        # Until the rollout has been trained on, save() writes the state of its beginning; see there.
        self._rollout_start = {"random_state": self._get_random_state(), "num_timesteps": self.num_timesteps}
        callback.on_rollout_start()
        if self.sde_window is None:
            self._sde_steps = None
        else:
            places = self.policy.num_flow_steps - self.sde_window + 1
            first = int(torch.randint(places, (1,), generator=self._generator))
            self._sde_steps = list(range(first, first + self.sde_window))

        if n_rollout_steps is None:
            cut_off = self._collect_episodes(env, callback, rollout_buffer)
        else:
            cut_off = self._collect_steps(env, callback, rollout_buffer, n_rollout_steps)
        if cut_off is None:
            return False
        self._starts_checked = True  # one rollout tells
        statistics = rollout_buffer.finish(self.gamma, self.advantage, self.advantage_eps, cut_off)
        if statistics["largest_group"] < 2 and not self._lonely_groups:
            self._lonely_groups = True
            warnings.warn(
                "No group of this rollout has two finished episodes to compare, so there is nothing to learn from it. "
                "Collect more steps (n_steps), use more environments, or leave n_steps out: whole episodes.",
                UserWarning,
                stacklevel=2,
            )
        self.logger.record("rollout/return_mean", statistics["return_mean"])
        self.logger.record("rollout/group_success_std", statistics["group_success_std"])
        self.logger.record("rollout/informative_groups", statistics["informative_groups"])
        self.logger.record("rollout/groups", statistics["groups"])
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _reset(self, env: VecEnv, seeds: np.ndarray, options: list[dict[str, Any]] | None = None) -> VecEnvObs:
        """Reset all environments, each with its own seed and options."""
        if options is not None:
            env.set_options(options)
        # SB3's seed() gives every environment another one; the list it fills is what reset() reads.
        env.unwrapped._seeds = [int(seed) for seed in seeds]
        return env.reset()

    def _check_starts(self, obs: VecEnvObs, groups: np.ndarray, first: dict[int, list[np.ndarray]]) -> None:
        """Warn, once, if environments of one group begin with different observations.

        :param groups: (n_envs,), the group of each. first: the first observation of every group so far, which grows
        """
        if self._starts_checked:
            return
        if self._vec_normalize_env is not None:  # its scale changes with every step
            obs = self._vec_normalize_env.get_original_obs()
        values = list(obs.values()) if isinstance(obs, dict) else [cast(np.ndarray, obs)]
        for index, group in enumerate(groups.tolist()):
            own = [value[index].copy() for value in values]
            if not all(map(np.array_equal, own, first.setdefault(group, own))):
                warnings.warn(
                    "Environments of one group were reset with the same seed, or the same group_options, and begin "
                    "with different observations. Advantages compare the rollouts of a group, which should share their "
                    "start: draw it from self.np_random in the environment, or name all of it in group_options. (Noise "
                    "on the observation alone is no harm.)",
                    UserWarning,
                    stacklevel=2,
                )
                self._starts_checked = True
                return

    def _draw_seeds(self, count: int) -> np.ndarray:
        return self._start_rng.integers(2**31 - 1, size=count)

    def _collect_episodes(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: GroupRolloutBuffer
    ) -> frozenset[int] | None:
        """The first episode of every environment after a group reset, in as many rounds as the groups need."""
        n_groups = self._count_groups(env)
        seeds = self._draw_seeds(n_groups).repeat(self.group_size)  # one per episode
        options: list[dict[str, Any]] | None = None
        if self.group_options is not None:
            seeds = self._draw_seeds(n_groups * self.group_size)
            chosen = [self.group_options(self._start_rng) for _ in range(n_groups)]
            options = [chosen[i // self.group_size] for i in range(n_groups * self.group_size)]
        first_observations: dict[int, list[np.ndarray]] = {}
        for first in range(0, n_groups * self.group_size, env.num_envs):
            episodes = first + np.arange(env.num_envs)
            groups = episodes // self.group_size
            for episode, group in zip(episodes.tolist(), groups.tolist(), strict=True):
                rollout_buffer.start_episode(episode, group)
            obs = self._reset(env, seeds[episodes], options and options[first : first + env.num_envs])
            self._check_starts(obs, groups, first_observations)
            running = np.ones(env.num_envs, dtype=bool)
            for step in range(self.max_episode_steps):
                rows = np.flatnonzero(running)
                _pause(env, ~running)
                result = self._step(env, callback, rollout_buffer, obs, rows, episodes[rows], np.full(len(rows), step))
                if result is None:
                    _pause(env, np.zeros(env.num_envs, dtype=bool))
                    return None
                obs, dones = result
                running &= ~dones
                if not running.any():
                    break
            _pause(env, np.zeros(env.num_envs, dtype=bool))
            self._last_obs = obs  # type: ignore[assignment]
            self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        return frozenset()

    def _collect_steps(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: GroupRolloutBuffer, n_steps: int
    ) -> frozenset[int] | None:
        """Exactly n_steps steps of every environment."""
        slots = np.arange(env.num_envs) // self.group_size
        ordinals = np.zeros(env.num_envs, dtype=np.int64)  # number of the episode in its environment
        episodes = np.arange(env.num_envs)
        steps = np.zeros(env.num_envs, dtype=np.int64)
        next_episode = env.num_envs
        seeds = self._draw_seeds(int(slots[-1]) + 1)[slots]

        def declare(index: int) -> None:
            if env.num_envs == 1:
                group = int(ordinals[0]) // self.group_size
            else:
                group = int(ordinals[index]) * env.num_envs + int(slots[index])
            rollout_buffer.start_episode(int(episodes[index]), group)

        for index in range(env.num_envs):
            declare(index)
        obs = self._reset(env, seeds)
        first_observations: dict[int, list[np.ndarray]] = {}
        self._check_starts(obs, slots, first_observations)
        for _ in range(n_steps):
            result = self._step(env, callback, rollout_buffer, obs, np.arange(env.num_envs), episodes, steps)
            if result is None:
                return None
            obs, dones = result
            steps = np.where(dones, 0, steps + 1)
            for index in np.flatnonzero(dones).tolist():
                ordinals[index] += 1
                episodes[index] = next_episode
                next_episode += 1
                declare(index)
            if env.num_envs == 1 and dones[0]:
                if ordinals[0] % self.group_size == 0:
                    seeds = self._draw_seeds(1)
                obs = self._reset(env, seeds)
                self._check_starts(obs, ordinals // self.group_size, first_observations)
            self._last_obs = obs  # type: ignore[assignment]
            self._last_episode_starts = dones
        return frozenset(int(episodes[i]) for i in range(env.num_envs) if ordinals[i] > 0 and steps[i] > 0)

    def _step(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: GroupRolloutBuffer,
        obs: VecEnvObs,
        rows: np.ndarray,
        episodes: np.ndarray,
        steps: np.ndarray,
    ) -> tuple[VecEnvObs, np.ndarray] | None:
        """One step of all environments; those in ``rows`` act by the policy and are stored, finished ones idle.

        :return: next observations and dones, or None if a callback ended training
        """
        if isinstance(obs, dict):
            row_obs: Any = {key: obs[key][rows] for key in cast(spaces.Dict, self.policy.used_space)}
        else:
            row_obs = obs[rows]  # type: ignore[call-overload, index]
        chain = self.policy.sample(
            obs_as_tensor(row_obs, self.device),
            self.noise_level,
            self.noise_schedule,
            self._generator,
            self._sde_steps,
            min_rows=MIN_ROWS,
        )
        assert isinstance(self.action_space, spaces.Box)
        middle = (self.action_space.low + self.action_space.high) / 2
        actions = np.repeat(middle[None].astype(self.action_space.dtype), env.num_envs, axis=0)
        actions[rows] = self.policy.clip_action(self.policy.unnormalize_action(chain.sample).cpu().numpy())
        new_obs, rewards, dones, infos = env.step(actions)
        if self._vec_normalize_env is not None:
            rewards = self._vec_normalize_env.get_original_reward()
        # Callbacks are not to count what idle environments do.
        idle = np.ones(env.num_envs, dtype=bool)
        idle[rows] = False
        rewards, dones = np.where(idle, 0.0, rewards), dones & ~idle
        infos = [{} if idle[i] else info for i, info in enumerate(infos)]
        self.num_timesteps += env.num_envs
        callback.update_locals(locals())
        if not callback.on_step():
            return None
        row_infos = [infos[i] for i in rows]
        self._update_info_buffer(row_infos, dones[rows])
        for info, episode, done in zip(row_infos, episodes.tolist(), dones[rows].tolist(), strict=True):
            if done and "is_success" in info:
                rollout_buffer.successes[episode] = bool(info["is_success"])
        rollout_buffer.add(row_obs, chain, episodes, steps, rewards[rows], self._executed(row_infos))
        return new_obs, dones

    def _executed(self, infos: list[dict[str, Any]]) -> np.ndarray:
        """Which action entries count, (B, *A): not padding, and executed."""
        shape = self.policy.action_shape
        mask = np.ones((len(infos), *shape), dtype=bool)
        if self.action_mask is not None:
            mask &= self.action_mask
        for row, info in enumerate(infos):
            if "executed_actions" in info:
                mask[row, int(info["executed_actions"]) :] = False
        return mask

    # ---- update

    def _flow_scale_weights(self, chain: FlowChain) -> Tensor:
        """Weights of the stochastic flow steps. Their mean is 1 over all K steps, stochastic or not: a late window
        weighs less than an early one, for its gradients are larger."""
        steps = chain.sde_steps
        _, coefficients, stds = transition_coefficients(
            chain.times[:-1], chain.times[1:], chain.noise_level, chain.schedule
        )
        if self.flow_scale == "paper":
            return flow_scale_weights(stds, **self.flow_scale_kwargs)[steps]
        if self.flow_scale == "equalizing":
            return equalizing_weights(stds, coefficients)[steps]
        return torch.ones(len(steps))

    def train(self) -> None:
        """One update from the collected rollout: n_epochs passes in minibatches."""
        # The mode of sampling: with dropout on, the ratio would not be 1 before the first update.
        self.policy.set_training_mode(False)
        self._update_learning_rate(self.policy.optimizer)
        assert isinstance(self.clip_range, FloatSchedule)
        clip_low = self.clip_range(self._current_progress_remaining)
        high = self.clip_range_high
        clip_high = clip_low if high is None else FloatSchedule(high)(self._current_progress_remaining)
        self.logger.record("train/clip_range", clip_low)
        self.logger.record("train/clip_range_high", clip_high)
        samples = self.rollout_buffer.samples
        assert samples is not None
        if len(samples) == 0:
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
            self._rollout_start = None
            return

        weights = self._flow_scale_weights(samples.chain).to(self.device)
        for k, weight in zip(samples.chain.sde_steps, weights.tolist(), strict=True):
            self.logger.record(f"train/flow_scale_w_{k}", weight)
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        statistics: list[dict[str, float]] = []
        first = True
        for _ in range(self.n_epochs):
            stop = False
            for batch in self.rollout_buffer.minibatches(self.batch_size, self._generator, self.device):
                values, step_norms = self._accumulate_gradients(batch, weights, clip_low, clip_high)
                if first:
                    self._check_first_ratio(values["ratio_extreme"])
                    for k, norm in zip(samples.chain.sde_steps, step_norms, strict=True):
                        self.logger.record(f"train/flow_step_grad_norm_{k}", norm)
                    first = False
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(f"the loss became {values['loss']}; lower learning_rate or clip_range")
                statistics.append(values)
                stop = self.target_kl is not None and values["approx_kl"] > 1.5 * self.target_kl
                if stop:
                    break
                values["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
                if not math.isfinite(values["grad_norm"]):
                    raise FloatingPointError("the gradient is not finite; lower learning_rate or clip_range")
                self.policy.optimizer.step()
            self._n_updates += 1
            if stop:
                if self.verbose >= 1:
                    print(f"Early stopping of the update: approximate KL {statistics[-1]['approx_kl']:.3f}")
                break
        self.policy.optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update_parameters(self.policy)
        self._rollout_start = None

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name in ("loss", "policy_gradient_loss", "kl_loss", "bc_loss", "approx_kl", "clip_fraction", "grad_norm"):
            recorded = [values[name] for values in statistics if name in values]
            if recorded:
                self.logger.record(f"train/{name}", float(np.mean(recorded)))

    def _accumulate_gradients(
        self, batch: GroupRolloutSamples, weights: Tensor, clip_low: float, clip_high: float
    ) -> tuple[dict[str, float], list[float]]:
        """Gradients of one minibatch, over micro-batches.

        :return: statistics of the minibatch, and the mean gradient norm per flow step with respect to the velocity
        """
        self.policy.optimizer.zero_grad(set_to_none=True)
        size = self.micro_batch_size or len(batch)
        totals: dict[str, float] = {}
        extreme = 0.0
        step_norms = [0.0] * len(weights)
        for begin in range(0, len(batch), size):
            rows = batch.rows(slice(begin, begin + size))
            chain, share = rows.chain, len(rows) / len(batch)
            context = self.policy.encode(rows.observations, min_rows=MIN_ROWS)
            velocities: list[Tensor] = []

            def velocity(
                x: Tensor, t: Tensor, context: Tensor = context, velocities: list[Tensor] = velocities
            ) -> Tensor:
                result = self.policy.velocity(x, t, context, min_rows=MIN_ROWS)
                result.retain_grad()
                velocities.append(result)
                return result

            steps = chain.sde_steps
            means = chain_means(velocity, chain, steps)
            stds = chain.stds[steps].reshape((-1,) + (1,) * (means.ndim - 1))
            reached = chain.states[1:][steps]
            difference = log_prob_difference(reached, means, chain.means[steps], stds)
            log_ratio = aggregate_log_ratio(
                difference, weights, rows.action_mask, self.ratio, self.flow_scale_placement
            )
            advantages = rows.advantages
            if self.ratio == "dim":
                advantages = advantages.reshape((-1,) + (1,) * (log_ratio.ndim - 1))
            objective = clipped_objective(log_ratio, advantages, clip_low, clip_high, self.dual_clip)
            counted = torch.ones_like(objective, dtype=torch.bool)
            if self.ratio == "dim":
                counted = rows.action_mask
                objective = torch.where(counted, objective, 0.0)
            # Sum over the ratios of an action, mean over actions: at ratio 1 all three kinds have the same gradient.
            policy_loss = -objective.sum() / len(rows)
            loss = policy_loss
            values = {"policy_gradient_loss": policy_loss.item()}
            if self.kl_coef > 0:
                kl = self._reference_kl(rows, means, stds)
                loss = loss + self.kl_coef * kl
                values["kl_loss"] = kl.item()
            if self.bc_coef > 0:
                bc_loss = self._bc_loss(len(rows))
                loss = loss + self.bc_coef * bc_loss
                values["bc_loss"] = bc_loss.item()
            (share * loss).backward()  # type: ignore[no-untyped-call]

            with torch.no_grad():
                values["loss"] = loss.item()
                ratio = log_ratio.exp()
                action_log_ratio = torch.where(rows.action_mask, difference, 0.0).sum(0).flatten(1).sum(1)
                values["approx_kl"] = (action_log_ratio.exp() - 1 - action_log_ratio).mean().item()
                clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
                values["clip_fraction"] = clipped[counted].float().mean().item()
                largest = log_ratio.flatten()[log_ratio.abs().argmax()].item()
                extreme = max(extreme, largest, key=abs)
                for i, value in enumerate(velocities):
                    if value.grad is not None:
                        step_norms[i] += value.grad.flatten(1).norm(dim=1).sum().item()
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + share * value
        totals["ratio_extreme"] = math.exp(min(extreme, 700.0))
        return totals, step_norms

    def _reference_kl(self, rows: GroupRolloutSamples, means: Tensor, stds: Tensor) -> Tensor:
        """Exact KL of the flow chains' transitions to the reference policy's, per action, averaged over actions."""
        assert self.reference_policy is not None
        reference = self.reference_policy
        with torch.no_grad():
            context = reference.encode(rows.observations, min_rows=MIN_ROWS)
            reference_means = chain_means(lambda x, t: reference.velocity(x, t, context, min_rows=MIN_ROWS), rows.chain)
        divergence = gaussian_kl(means, reference_means, stds)
        return torch.where(rows.action_mask, divergence, 0.0).sum() / len(rows)

    def _bc_loss(self, count: int) -> Tensor:
        """Flow-matching loss on random demonstrations."""
        assert self._bc_data is not None  # learn() makes it
        index = torch.randint(len(self._bc_data), (count,), generator=self._generator)
        obs, actions = self._bc_data.batch(index, self.device)
        return flow_matching_loss(self.policy, obs, actions, self._generator, 1)

    def _check_first_ratio(self, extreme: float) -> None:
        """Before the first update nothing has changed, so the ratio is 1; if not, sampling and scoring disagree."""
        self.logger.record("train/ratio_first_minibatch", extreme)
        if self._ratio_checked:
            return
        self._ratio_checked = True
        if abs(extreme - 1) > RATIO_TOLERANCE:
            warnings.warn(
                f"The ratio of new to old probability is {extreme:.6g} before the first update; it must be 1. Sampling "
                "and scoring disagree. Likely causes: dropout or batch normalisation in the policy, a network in lower "
                "precision (autocast, bfloat16, TF32), an encoder whose result depends on the other rows of the batch.",
                UserWarning,
                stacklevel=2,
            )

    # ---- learn, save, load

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "FAGRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train until at least ``total_timesteps`` environment steps (of all environments) were taken; see SB3."""
        if self.kl_coef > 0 and self.reference_policy is None:
            self._make_reference()
        if self.bc_coef > 0:
            if self.demonstrations is None:
                raise ValueError(
                    "bc_coef > 0 needs demonstrations; they are not saved with a model: set model.demonstrations"
                )
            if self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs:
                raise ValueError(
                    "VecNormalize normalises the environments' observations and not those of the demonstrations: leave "
                    "bc_coef out, or make it with norm_obs=False"
                )
            self._bc_data = DemonstrationTensors(self.demonstrations, self.policy)
        if self._ema is not None and int(self._ema.n_averaged) == 1:
            self._make_average()  # again: weights may have been loaded or cloned since
        self._ratio_checked = self._lonely_groups = self._starts_checked = False
        window = self.stats_window_size or 100
        if self.stats_window_size is None and self.n_steps is None and self.env is not None:
            window = self._count_groups(self.env) * self.group_size
        self._stats_window_size = window
        for name in ("ep_info_buffer", "ep_success_buffer"):  # which a model that goes on keeps
            if (episodes := getattr(self, name)) is not None and episodes.maxlen != window:
                setattr(self, name, deque(episodes, maxlen=window))
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        self._rollout_start = None  # a callback may have ended training amid a rollout, for good
        return self

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: Any = "auto") -> None:
        """Load parameters from a file or a dict, see SB3. A reference policy among them is made first. A moving average
        among them is left out by a model without ``ema_decay``; where there is none, that of this model begins anew.
        """
        if isinstance(load_path_or_dict, dict):
            parameters = dict(load_path_or_dict)
        else:
            parameters = load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1]
        if "reference_policy" in parameters and self.reference_policy is None:
            self._make_reference()
        if self._ema is None:
            parameters.pop("_ema", None)
        begins = self._ema is not None and "_ema" not in parameters
        if begins:
            parameters["_ema"] = self._ema.state_dict()  # type: ignore[union-attr]  # for an exact match
        super().set_parameters(parameters, exact_match, device)
        if begins:
            self._make_average()

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Save everything to a zip file, as SB3 does, with the state of the random generators.

        The rollout in progress is not part of it: a model that a callback saves amid a rollout has the random state and
        the ``num_timesteps`` of the rollout's beginning, and collects it again after loading. So a killed run, resumed
        from any checkpoint, arrives at the numbers of an unbroken one (where the environment is deterministic in its
        seed).
        """
        num_timesteps = self.num_timesteps
        self._frozen = [name for name, value in self.policy.named_parameters() if not value.requires_grad]
        if self._rollout_start is None:
            self._random_state = self._get_random_state()
        else:
            self._random_state = self._rollout_start["random_state"]
            self.num_timesteps = self._rollout_start["num_timesteps"]
        try:
            if isinstance(path, str | pathlib.Path):
                # Never half a file under the final name: a run is killed when it likes.
                path = pathlib.Path(path)
                final = path if path.suffix else path.with_name(f"{path.name}.zip")
                temporary = final.with_name(f".{final.name}.tmp.zip")
                super().save(temporary, exclude, include)
                os.replace(temporary, final)
            else:
                super().save(path, exclude, include)
        finally:
            self.num_timesteps = num_timesteps

    def _get_random_state(self) -> dict[str, Any]:
        return {"torch": self._generator.get_state(), "starts": self._start_rng.bit_generator.state}

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a saved model; training goes on exactly where it was, or with random numbers of its own where a ``seed``
        is given. Arguments as SB3's."""
        model = super().load(*args, **kwargs)
        for name in model._frozen:
            model.policy.get_parameter(name).requires_grad_(False)
        if model._random_state is not None and "seed" not in kwargs:
            model._generator.set_state(model._random_state["torch"])
            model._start_rng.bit_generator.state = model._random_state["starts"]
        return model

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "reference_policy",
            "_ema",
            "demonstrations",
            "_bc_data",
            "_generator",
            "_start_rng",
            "_initial_policy",
            "_rollout_start",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "policy.optimizer"]
        state_dicts += [name for name in ("reference_policy", "_ema") if getattr(self, name) is not None]
        return state_dicts, []
