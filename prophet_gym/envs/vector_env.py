"""ProphetVectorEnv: many imagined robots at once, one call of the world model for all of them."""

import copy
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch.nn import functional as F

from prophet_gym.data.episode import ACTION_DIM, ACTION_TOLERANCE, PROPRIO_BOUND, PROPRIO_DIM
from prophet_gym.data.instructions import EMBEDDING_DIM
from prophet_gym.envs.models import WorldModel, resolve_models
from prophet_gym.envs.start_states import (
    USER_SUITE,
    ResetRequest,
    StartState,
    instruction_embedding,
    load_start_states,
    user_start,
)
from prophet_gym.reward.base import (
    THRESHOLDS,
    RememberingRewardModel,
    RewardModel,
    check_threshold,
    clip_places,
    thresholds,
    warn_of_unknown_suite,
)

Observation = dict[str, NDArray[Any]]

REWARD_TYPES = ("sparse", "probability")

_STATE = (
    "_history",
    "_state",
    "_memory",
    "_embeddings",
    "_lengths",
    "_probability",
    "_solved",
    "_done",
    "_starts",
    "_members",
    "_seeds",
)


class ProphetVectorEnv(VectorEnv[Observation, NDArray[np.float32], NDArray[Any]]):
    """Prophet-LIBERO as a native vector environment; see :class:`ProphetEnv` for the task itself.

    Every env has its own random streams (``np_random[i]`` for starts and, seeded from it, one for the members of the
    world model's ensemble and a ``torch.Generator`` for its noise), so that a seed and a sequence of actions give the
    same video whatever the other envs do (up to the rounding of batched float32 products: at most one grey level here
    and there). It behaves as ``SyncVectorEnv`` over :class:`ProphetEnv` in all three autoreset modes.

    :param num_envs: number of robots imagined side by side.
    :param suite: task suite, one of those with recorded starts, e.g. ``"libero_object"`` or ``"libero_spatial"``.
    :param task: number or snake-case name of the task; None draws one at each reset.
    :param split: which official initial states: ``"train"`` (0-39), ``"val"`` (40-44) or ``"test"`` (45-49).
    :param max_chunks: an episode is truncated after this many steps (20: 160 control steps, 8 s at 20 Hz;
        the tasks of libero_10 take 30).
    :param world_model: name of a checkpoint in the wheel, path of one, or a ``ProphetPipeline``.
    :param reward_model: likewise; or any object with ``score`` and ``threshold``, see ``RewardModel``.
    :param reward_type: ``"sparse"``: 1.0 at success, else 0.0; ``"probability"``: the increase of the success
        probability during the step, so that the rewards of an episode sum to its final minus its initial probability.
    :param threshold: of the reward model, at which an episode is solved and ends: ``"strict"``, which few failures
        pass, or ``"balanced"``, which finds more of the successes, and by which rates are right on the whole.
    :param num_sampling_steps: denoising steps per chunk; None is the world model's own default.
    :param device: of models given by name or path: ``"auto"`` (CUDA if there is any), ``"cpu"``, ``"cuda:0"`` ...
    :param dtype: of a world model given by name or path: ``"auto"`` (float32), ``"float32"``, ``"bfloat16"`` or
        ``"float16"``. Its proprioception and the reward model keep float32.
    :param start_states: parquet file of start states; None is the one in the wheel.
    :param member: number of the member of the world model's ensemble that moves the robots; None draws one for each
        episode.
    :param autoreset_mode: ``"NextStep"``, ``"SameStep"`` or ``"Disabled"`` (reset with ``options["reset_mask"]``).
    :param render_mode: None or ``"rgb_array"``.
    :param video: False: only the robot's motion is imagined, many times as fast, and the judge hears of it alone.
        Observations have no ``image``, infos no ``frames``; for policies that need none, and the same motion otherwise.

    The attribute ``paused``, bool (num_envs,), is yours to set: :meth:`step` leaves those envs as they are and spends
    nothing on them (an algorithm that waits for the last episodes of a batch). They repeat their observation with
    reward 0; their actions are not looked at. A reset does not change it.

    :raises ValueError: an unknown suite, task, split, member, reward type, threshold, mode, device or dtype, a
        threshold that the reward model lacks; damaged weights.
    :raises FileNotFoundError: no such model or start states.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": 2.5,  # one frame per step() of 8 control steps at 20 Hz; info["frames"] holds the rest, at 5 fps
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        suite: str = "libero_object",
        task: int | str | None = None,
        split: str = "train",
        max_chunks: int = 20,
        world_model: str | Path | WorldModel = "prophet-libero-tiny",
        reward_model: str | Path | RewardModel = "reward-libero",
        reward_type: str = "sparse",
        threshold: str = "strict",
        num_sampling_steps: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        start_states: str | os.PathLike[str] | None = None,
        member: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        video: bool = True,
    ) -> None:
        if not video:
            self.metadata = {**self.metadata, "render_modes": []}
            if render_mode is not None:
                # A TypeError, as of an env without render modes: Stable-Baselines3's make_vec_env then does without.
                raise TypeError("video=False imagines nothing to render: leave render_mode out, or video=False.")
        for name, value in (
            ("num_envs", num_envs),
            ("max_chunks", max_chunks),
            ("num_sampling_steps", num_sampling_steps),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{name} must be a positive int, got {value!r}.")
        for name, choice, choices in (
            ("reward_type", reward_type, REWARD_TYPES),
            ("threshold", threshold, THRESHOLDS),
            ("render_mode", render_mode, (None, *self.metadata["render_modes"])),
            ("autoreset_mode", autoreset_mode, (*AutoresetMode, *(mode.value for mode in AutoresetMode))),
        ):
            if choice not in choices:
                raise ValueError(
                    f"Unknown {name} {choice!r}. Valid: {[c for c in choices if not isinstance(c, AutoresetMode)]}."
                )
        self.start_states = load_start_states(start_states)
        self.suite, self.split = suite, split
        self.task = None if task is None else self.start_states.task_number(suite, split, task)
        self.start_states.tasks(suite, split)
        self.video = video
        self.world_model, self.reward_model = resolve_models(world_model, reward_model, device, dtype, video)
        check_threshold(self.reward_model, threshold, video)
        self.threshold = threshold
        self.member = self._check_member(member)
        self.reward_type, self.max_chunks, self.num_sampling_steps = reward_type, max_chunks, num_sampling_steps
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}

        size = self.world_model.image_size
        if self.start_states.image_size != size:
            raise ValueError(
                f"{self.start_states.path} holds images of {self.start_states.image_size} pixels a side and this world "
                f"model works at {size}: pass start_states=PATH of starts recorded at {size} pixels."
            )
        self.num_envs = int(num_envs)
        if self.world_model.action_dim % ACTION_DIM:
            raise ValueError(
                f"An action has {ACTION_DIM} numbers for each arm, this world model's {self.world_model.action_dim}."
            )
        # Spaces are those of the suite's robot; inside, zeros stand for arms that others have.
        self._arms: dict[str, int] = {}
        self.num_arms = self._arms_of(suite)
        proprio_dim = PROPRIO_DIM * (self.world_model.action_dim // ACTION_DIM)
        entries: dict[str, gym.spaces.Space[Any]] = {
            "proprio": gym.spaces.Box(-PROPRIO_BOUND, PROPRIO_BOUND, (PROPRIO_DIM * self.num_arms,), np.float32),
            "instruction": gym.spaces.Box(-1.0, 1.0, (EMBEDDING_DIM,), np.float32),
        }
        if video:
            entries["image"] = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.single_observation_space = gym.spaces.Dict(entries)
        chunk = (self.world_model.chunk_size, ACTION_DIM * self.num_arms)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, chunk, np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        frames = 1 + max_chunks * self.world_model.chunk_frames
        # The episode so far, start first; without video, the start alone.
        self._clips = np.zeros((num_envs, frames if video else 1, size, size, 3), np.uint8)
        self._proprio = np.zeros((num_envs, frames, proprio_dim), np.float32)  # at each frame
        self._lengths = np.zeros(num_envs, np.int64)  # frames so far
        self._embeddings = np.zeros((num_envs, EMBEDDING_DIM), np.float32)
        self._probability = np.zeros(num_envs, np.float64)
        self._solved = np.zeros(num_envs, np.bool_)  # the probability has reached the threshold
        self._done = np.zeros(num_envs, np.bool_)
        self._paused = np.zeros(num_envs, np.bool_)
        self._history: torch.Tensor | None = None  # (num_envs, T_h, C, h, w)
        self._state: torch.Tensor | None = None  # (num_envs, S)
        self._memory: dict[str, torch.Tensor] = {}  # the judge's, (num_envs, ...)
        self._starts: list[StartState | None] = [None] * num_envs
        self._members = np.zeros(num_envs, np.int64)  # of the world model's ensemble
        self._seeds: list[int] = [-1] * num_envs
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        # Not np_random, which visits the starts that the real simulator's does.
        self._member_rngs = [np.random.default_rng() for _ in range(num_envs)]
        self._noise = [torch.Generator() for _ in range(num_envs)]

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The random stream of each env, from which its starts are drawn."""
        return tuple(self._rng(i) for i in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each env's random stream."""
        self.np_random  # noqa: B018  (seeds the streams that have none yet)
        return tuple(self._seeds)

    @property
    def paused(self) -> NDArray[np.bool_]:
        """Which envs :meth:`step` leaves as they are, bool (num_envs,); yours to set.

        :raises ValueError: another shape or dtype.
        """
        return self._paused

    @paused.setter
    def paused(self, paused: NDArray[np.bool_]) -> None:
        given = np.asarray(paused)
        if given.dtype != np.bool_ or given.shape != (self.num_envs,):
            raise ValueError(f"paused must be bool of shape ({self.num_envs},), got {given.dtype} {given.shape}.")
        self._paused = given.copy()

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin new episodes.

        :param seed: an int (env i gets ``seed + i``), one int or None per env, or None: the random streams go on. Envs
            with equal seeds get the same start, member and noise. Below 2**63, for infos tell them.
        :param options: a dict, or a list with one dict of :class:`ProphetEnv`'s options per env. Of the dict

            - ``suite``, ``task``, ``init_state``: for these episodes; one value, or one per env (None: as constructed,
              or drawn).
            - ``member``: likewise, which member of the world model's ensemble moves the robot; drawn if None.
            - ``group_size``: G; envs ``i * G ... (i + 1) * G - 1`` share one start and member, drawn by the first of
              them. Their noise differs. It holds for the episodes that begin now; an autoreset draws for itself.
            - ``start``: ``{"image", "proprio", "instruction"}`` with one entry per env, your own start: see
              :func:`~prophet_gym.envs.start_states.user_start`.
            - ``reset_mask``: bool (num_envs,), the envs to reset; the others go on.
        :return: observations and infos of all envs; infos of the envs that were reset.
        :raises ValueError, TypeError: an unknown or contradictory option, a wrong mask, start, suite, task, init_state,
            member.
        :raises gymnasium.error.ResetNeeded: ``reset_mask`` leaves out an env that has never been reset.

        A reset that raises because of what it was given leaves episodes, seeds and random streams as they were.
        """
        request = ResetRequest.parse(options, self.num_envs)
        if isinstance(seed, int | np.integer):
            seed = [int(seed) + i for i in range(self.num_envs)]
        if seed is not None:
            if len(seed) != self.num_envs:
                raise ValueError(f"A list of seeds needs one per env ({self.num_envs}), got {len(seed)}.")
            seed = [None if one is None else operator.index(one) for one in seed]
            if wrong := [one for one in seed if one is not None and not 0 <= one < 2**63]:
                raise ValueError(f"Seeds must be in 0 ... 2**63 - 1, got {wrong[0]}.")
        rows = np.flatnonzero(request.mask)
        if any(self._starts[i] is None for i in np.flatnonzero(~request.mask).tolist()):
            raise gym.error.ResetNeeded("The first reset() must reset every env: leave 'reset_mask' out.")
        starts: dict[int, tuple[StartState, int]] = {}
        streams = [list(of_envs) for of_envs in (self._rngs, self._seeds, self._member_rngs, self._noise)]
        states = [(rng, rng.bit_generator.state) for rng in (*self._rngs, *self._member_rngs) if rng is not None]
        try:
            for i in rows.tolist():
                self._rng(i, None if seed is None else seed[i])
                leader = i - i % request.group_size
                starts[i] = starts[leader] if leader in starts else self._choose_start(i, request.per_env[i])
        except Exception:
            self._rngs, self._seeds, self._member_rngs, self._noise = streams
            for rng, state in states:
                rng.bit_generator.state = state
            raise
        self._begin(rows, list(starts.values()))
        infos: dict[str, Any] = {}
        for i in rows.tolist():
            infos = self._add_info(infos, self._info(i), i)
        return self._observations(), infos

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Imagine one chunk in every env (an env that an autoreset begins anew ignores its action).

        :param actions: float (num_envs, chunk, 7) in [-1, 1], 7 for each arm of the suite's robot.
        :raises ValueError: actions of a wrong shape, not numbers, not finite, or out of range.
        :raises gymnasium.error.ResetNeeded: before the first reset(), or after an episode's end without autoreset.
        """
        if self._starts[0] is None:
            raise gym.error.ResetNeeded("Call reset() before step().")
        # under NEXT_STEP these episodes begin anew in this step; under SAME_STEP there are none
        begin = self._done & ~self.paused
        if self.autoreset_mode is AutoresetMode.DISABLED and begin.any():
            raise gym.error.ResetNeeded(
                f"The episodes of envs {np.flatnonzero(begin).tolist()} are over: call reset() (of a vector env, for "
                "them alone with options={'reset_mask': ...})."
            )
        rows = np.flatnonzero(~begin & ~self.paused)
        actions = self._check_actions(actions, rows)
        rewards = np.zeros(self.num_envs, np.float64)
        terminated = np.zeros(self.num_envs, np.bool_)
        if rows.size:
            before = self._probability[rows]
            self._imagine(rows, actions[rows])
            terminated[rows] = self._solved[rows]
            rewards[rows] = terminated[rows] if self.reward_type == "sparse" else self._probability[rows] - before
        truncated = np.zeros(self.num_envs, np.bool_)
        truncated[rows] = ~terminated[rows] & (self._lengths[rows] == self._proprio.shape[1])
        infos: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            begin = terminated | truncated
            final = self._observations()
            for i in np.flatnonzero(begin).tolist():
                final_obs = {name: values[i].copy() for name, values in final.items()}
                infos = self._add_info(infos, {"final_obs": final_obs, "final_info": self._info(i)}, i)
        if begin.any():
            new = np.flatnonzero(begin)
            self._begin(new, [self._choose_start(i, {}) for i in new.tolist()])
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            self._done = terminated | truncated | (self._done & self.paused)
        for i in range(self.num_envs):
            infos = self._add_info(infos, self._info(i), i)
        return self._observations(), rewards, terminated, truncated, infos

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """The newest frame of every env, uint8 (H, W, 3) each; None without ``render_mode="rgb_array"``."""
        if self.render_mode is None:
            gym.logger.warn(
                "render() was called on an env made without a render mode: make it with render_mode='rgb_array'."
            )
            return None
        if self._starts[0] is None:
            raise gym.error.ResetNeeded("There is nothing to render before the first reset().")
        return tuple(self._observations()["image"])

    def clips(self) -> list[NDArray[np.uint8]]:
        """The video of every env's episode so far, uint8 (frames, H, W, 3) each, start first, 5 frames per second.

        :raises ValueError: the env was made with ``video=False``.
        :raises gymnasium.error.ResetNeeded: before the first reset().
        """
        if not self.video:
            raise ValueError("video=False imagines no frames: make the env with video=True to see clips.")
        if self._starts[0] is None:
            raise gym.error.ResetNeeded("There is no clip before the first reset().")
        return [clip[:length].copy() for clip, length in zip(self._clips, self._lengths, strict=True)]

    def get_state(self) -> dict[str, Any]:
        """Everything that a rollout depends on, random streams included: a copy, to go back to by :meth:`set_state`.

        :raises gymnasium.error.ResetNeeded: before the first reset().
        """
        if self._starts[0] is None:
            raise gym.error.ResetNeeded("There is no state before the first reset().")
        state = {name: copy.deepcopy(getattr(self, name)) for name in _STATE}
        state["clips"] = self._clips[:, : self._lengths.max()].copy()
        state["proprio"] = self._proprio[:, : self._lengths.max()].copy()
        state["np_random"] = [rng.bit_generator.state for rng in self.np_random]
        state["member_rngs"] = [rng.bit_generator.state for rng in self._member_rngs]
        state["noise"] = [generator.get_state() for generator in self._noise]
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` returned: the same actions then give the same future, bit for bit.

        :param state: of this env, or of another one with the same arguments.
        :raises ValueError: the state of an env with another number of envs or arms, frame size or longer episodes, or
            with video where this one has none.
        """
        clips, proprio = state["clips"], state["proprio"]
        if (
            clips.shape[0] != self.num_envs
            or clips.shape[2:] != self._clips.shape[2:]
            or proprio.shape[1] > self._proprio.shape[1]
            or (state["_lengths"][~state["_done"]] >= self._proprio.shape[1]).any()
            or proprio.shape[2] != self._proprio.shape[2]
            or (state["_history"] is not None) != self.video
        ):
            raise ValueError(
                f"This state has clips of shape {clips.shape} and proprio of shape {proprio.shape}, which do not fit "
                f"into this env's {self._clips.shape} and {self._proprio.shape} with video={self.video}; an episode "
                "that is not over needs room for another chunk."
            )
        for name in _STATE:
            setattr(self, name, copy.deepcopy(state[name]))
        self._clips[:, : clips.shape[1]] = clips
        self._proprio[:, : proprio.shape[1]] = proprio
        for i in range(self.num_envs):
            self._rng(i).bit_generator.state = state["np_random"][i]
            self._member_rngs[i].bit_generator.state = state["member_rngs"][i]
            self._noise[i].set_state(state["noise"][i])
        self._seeds = list(state["_seeds"])

    def _rng(self, i: int, seed: int | None = None) -> np.random.Generator:
        """The random stream of env i, made anew if a seed is given."""
        rng = self._rngs[i]
        if rng is None or seed is not None:
            if seed is None:
                seed = int(np.random.SeedSequence().generate_state(1)[0])
            rng, self._seeds[i] = seeding.np_random(seed)
            noise_seed, member_seed = rng.bit_generator.seed_seq.spawn(2)  # type: ignore[attr-defined]
            self._noise[i] = torch.Generator().manual_seed(int(noise_seed.generate_state(1, np.uint64)[0]))
            self._member_rngs[i] = np.random.default_rng(member_seed)
            self._rngs[i] = rng
        return rng

    def _choose_start(self, i: int, options: Mapping[str, Any]) -> tuple[StartState, int]:
        """The start of env i's next episode, and the member of the world model's ensemble that it belongs to."""
        member = self._check_member(options.get("member"))
        member = self.member if member is None else member
        if "start" in options:
            start = user_start(**options["start"], image_size=self.world_model.image_size)
        else:
            suite = options.get("suite") or self.suite
            task = options.get("task")
            if task is None and suite == self.suite:
                task = self.task
            start = self.start_states.draw(
                self._rng(i), suite=suite, split=self.split, task=task, init_state=options.get("init_state")
            )
        (suite,) = self._suites_of([start])
        arms = self._arms_of(suite)
        if not len(start.proprio) == PROPRIO_DIM * self.num_arms == PROPRIO_DIM * arms:
            raise ValueError(
                f"The robot of {self.suite!r} has {self.num_arms} arms in this world model, that of {suite!r} "
                f"{arms}, and the start's proprioception {len(start.proprio)} numbers, not {PROPRIO_DIM} "
                "for each arm: make an env of the start's suite with a world_model that was trained on it."
            )
        if member is None:
            member = int(self._member_rngs[i].integers(self.world_model.num_members))
        instruction_embedding(start.instruction)  # cached; raises while nothing has changed
        return start, member

    def _arms_of(self, suite: str) -> int:
        """Arms of a suite's robot; models that do not know the suite say so when it is first met."""
        if suite not in self._arms:
            warn_of_unknown_suite(self.reward_model, suite, self.video)
            self._arms[suite] = self.world_model.arms(suite)
        return self._arms[suite]

    def _check_member(self, member: Any) -> int | None:
        count = self.world_model.num_members
        if member is not None and (type(member) is bool or member not in range(count)):
            raise ValueError(f"Unknown member {member!r}. Valid: None, which draws one, and {list(range(count))}.")
        return None if member is None else int(member)

    def _begin(self, rows: NDArray[np.int64], chosen: Sequence[tuple[StartState, int]]) -> None:
        """Begin the episode ``chosen[k]`` in env ``rows[k]``, see :meth:`_choose_start`."""
        starts = [start for start, _ in chosen]
        self._members[rows] = [member for _, member in chosen]
        images = np.stack([start.image for start in starts])
        proprio = np.zeros((len(starts), self._proprio.shape[2]), np.float32)
        for row, start in zip(proprio, starts, strict=True):
            row[: len(start.proprio)] = start.proprio  # zeros for arms that the robot lacks
        index = torch.from_numpy(rows)
        state = self.world_model.init_state(torch.from_numpy(proprio), torch.from_numpy(self._members[rows]))
        if self._state is None:
            self._state = state.new_zeros((self.num_envs, *state.shape[1:]))
        self._state[index] = state
        if self.video:
            history = self.world_model.init_history(images)
            if self._history is None:
                self._history = history.new_zeros((self.num_envs, *history.shape[1:]))
            self._history[index] = history
        self._clips[rows, 0], self._proprio[rows, 0] = images, proprio
        self._lengths[rows] = 1
        self._done[rows] = False
        for i, start in zip(rows.tolist(), starts, strict=True):
            self._starts[i] = start
            self._embeddings[i] = instruction_embedding(start.instruction)
        if isinstance(self.reward_model, RememberingRewardModel):
            memory = self.reward_model.init_memory(proprio, images)
            if not self._memory:
                self._memory = {name: new.new_zeros((self.num_envs, *new.shape[1:])) for name, new in memory.items()}
            self._remember(rows, memory)
        self._judge(rows, 1)

    def _remember(self, rows: NDArray[np.int64], memory: Mapping[str, torch.Tensor]) -> None:
        """Let the judge remember this of envs ``rows``."""
        for name, new in memory.items():
            self._memory[name][torch.from_numpy(rows)] = new

    def _starts_of(self, rows: NDArray[np.int64]) -> list[StartState]:
        """The starts of envs ``rows``, all of which have been reset."""
        return [start for start in (self._starts[i] for i in rows.tolist()) if start is not None]

    def _suites_of(self, starts: Sequence[StartState]) -> list[str]:
        """The suites of some starts; a user's own is taken for one of the suite that the env was made for."""
        return [self.suite if start.suite == USER_SUITE else start.suite for start in starts]

    def _imagine(self, rows: NDArray[np.int64], actions: NDArray[np.float32]) -> None:
        """Append one imagined chunk to the episodes of envs ``rows``."""
        assert self._state is not None  # reset() comes first
        index, suites = torch.from_numpy(rows), self._suites_of(self._starts_of(rows))
        absent = self.world_model.action_dim - actions.shape[2]
        chunk_actions = F.pad(torch.from_numpy(actions), (0, absent)).to(self._state.device)
        new = self._lengths[rows, None] + np.arange(self.world_model.chunk_frames)
        if self.video:
            assert self._history is not None
            chunk = self.world_model.imagine(
                self._history[index],
                self._state[index],
                chunk_actions,
                images=self._clips[rows[:, None], np.stack([np.zeros_like(rows), self._lengths[rows] - 1], axis=1)],
                suites=suites,
                generator=[self._noise[i] for i in rows.tolist()],
                num_inference_steps=self.num_sampling_steps,
            )
            proprio, state = chunk.proprio, chunk.state
        else:
            proprio, state = self.world_model.imagine_motion(
                self._state[index], chunk_actions, starts=self._clips[rows, 0], suites=suites
            )
        finite = state.isfinite().all(dim=1)
        if self.video:  # a NaN in the video is black in its frames
            finite &= chunk.history.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            lost = rows[~finite.cpu().numpy()].tolist()
            raise FloatingPointError(
                f"The world model returned NaN for envs {lost}: try dtype='float32', or other weights."
            )
        if self._history is not None:  # with video
            self._history[index] = chunk.history
            self._clips[rows[:, None], new] = chunk.frames.numpy()
        self._state[index] = state
        self._proprio[rows[:, None], new] = proprio.numpy()
        self._lengths[rows] += self.world_model.chunk_frames
        self._judge(rows, self.world_model.chunk_frames)

    def _judge(self, rows: NDArray[np.int64], new: int) -> None:
        """Let the reward model see the episodes of envs ``rows``, of which so many frames are new."""
        lengths = self._lengths[rows]
        chosen = slice(None) if rows.size == self.num_envs else rows  # not a copy of all that there is
        episodes = self._starts_of(rows)
        suites = self._suites_of(episodes)
        instructions = [start.instruction for start in episodes]
        if isinstance(self.reward_model, RememberingRewardModel):
            probability, memory = self.reward_model.score_next(
                {name: kept[chosen] for name, kept in self._memory.items()},
                self._clips[rows[:, None], clip_places(lengths).T] if self.video else None,
                self._proprio[rows[:, None], lengths[:, None] + np.arange(-new, 0)],
                instructions,
                self._embeddings[rows],
                suites,
            )
            self._remember(rows, memory)
        else:
            probability = self.reward_model.score(
                self._clips[chosen, : lengths.max()] if self.video else None,
                self._proprio[chosen, : lengths.max()],
                lengths,
                instructions,
                self._embeddings[rows],
                self._clips[chosen, 0],
                suites,
            )
        if np.shape(probability) != rows.shape or not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError(
                f"The reward model must return {len(rows)} probabilities in [0, 1], one for each env, got {probability}"
            )
        self._probability[rows] = probability
        self._solved[rows] = self._probability[rows] >= thresholds(
            self.reward_model, suites, self.video, self.threshold
        )

    def _check_actions(self, actions: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        array = np.asarray(actions)
        if array.dtype.kind not in "fiu" or array.shape != self.action_space.shape:
            raise ValueError(
                f"Actions must be numbers of shape {self.action_space.shape}, got {array.dtype} {array.shape}."
            )
        values = array.astype(np.float64)  # first: an int8 of -128 has no absolute value
        peaks = np.abs(values[rows]).max(axis=(1, 2))
        wrong = ~(peaks <= 1 + ACTION_TOLERANCE)  # NaN included
        if wrong.any():
            raise ValueError(
                f"Actions must be finite and within [-1, 1]; envs {rows[wrong].tolist()} have largest magnitudes "
                f"{peaks[wrong].tolist()}. Nothing is clipped for you: normalise or np.clip them."
            )
        return values.astype(np.float32)

    def _observations(self) -> Observation:
        latest = np.arange(self.num_envs), self._lengths - 1
        proprio = self._proprio[latest][:, : PROPRIO_DIM * self.num_arms]
        observations = {"proprio": proprio, "instruction": self._embeddings.copy()}
        return observations | ({"image": self._clips[latest]} if self.video else {})

    def _info(self, i: int) -> dict[str, Any]:
        start, length, frames = self._starts[i], self._lengths[i], self.world_model.chunk_frames
        assert start is not None  # reset() comes first
        began = length == 1
        info = {
            "instruction": start.instruction,
            "suite": start.suite,
            "task": start.task,
            "init_state": start.init_state,
            "member": int(self._members[i]),
            "success_probability": float(self._probability[i]),
            "is_success": bool(not began and self._solved[i]),
            "seed": self._seeds[i],
        }
        if self.video and not began:
            info["frames"] = self._clips[i, length - frames : length].copy()
        return info
