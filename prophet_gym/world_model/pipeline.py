"""ProphetPipeline: from frames, proprioception and a chunk of actions to the frames that follow."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F

from prophet_gym.data.camera import projections_of
from prophet_gym.world_model.action_conditioning import (
    HOLD_DIM,
    carried_motion,
    carry,
    draw_action_frames,
    init_hold,
    update_hold,
)
from prophet_gym.world_model.autoencoder import ProphetAutoencoder
from prophet_gym.world_model.cosmos import ProphetCosmosAutoencoder, ProphetCosmosTransformer3DModel
from prophet_gym.world_model.history import advance_history
from prophet_gym.world_model.proprioception import ProprioceptionModel
from prophet_gym.world_model.transformer import ProphetTransformer3DModel


@dataclass
class ImaginedChunk(BaseOutput):
    """One imagined chunk.

    Attributes:
        frames: uint8 (B, chunk_frames, H, W, 3) on the CPU, upright RGB.
        proprio: float32 (B, chunk_frames, P) on the CPU, Prophet's estimate of the proprioception at each frame, metres
            and radians.
        history: float (B, T_h, C, h, w), to pass to the next call.
        state: float32 (B, S), to pass to the next call.
    """

    frames: torch.Tensor
    proprio: torch.Tensor
    history: torch.Tensor
    state: torch.Tensor


@dataclass
class ChunkCondition(BaseOutput):
    """What the commanded motion says about the frames of a chunk.

    Attributes:
        proprio: float32 (B, F, P), at each frame.
        scalars: float (B, F, D_c), actions and proprioception of each frame and the robot, see `frame_condition`.
        action_frames: float32 (B, 1 + F, 3, H / 2, W / 2), the end-effectors drawn at the present and at each frame.
        motion: float32 (B, F, 2 K, 3), see `image_motion`: of each of K hands from the present to each frame, and of
            what it holds, or held last, from where it was taken.
    """

    proprio: torch.Tensor
    scalars: torch.Tensor
    action_frames: torch.Tensor
    motion: torch.Tensor


def frames_to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """Convert uint8 (..., H, W, 3) frames to float32 (..., 3, H, W) pixels in [-1, 1]."""
    # In place: fresh memory for every operation takes most of the time.
    return frames.to(torch.float32, copy=True).div_(127.5).sub_(1.0).movedim(-1, -3)


def pixels_to_frames(pixels: torch.Tensor) -> torch.Tensor:
    """Convert float (..., 3, H, W) pixels in [-1, 1] (clamped) to uint8 (..., H, W, 3) frames."""
    return ((pixels.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8).movedim(-3, -1)


ACTION_STREAMS = ("both", "scalars", "frames")


class ProphetPipeline(DiffusionPipeline):
    r"""
    Prophet, the action-conditioned video world model (arXiv 2511.20633).

    A rollout is autoregressive: it begins with `init_history` of the observed frames and `init_state` of the observed
    proprioception; every `imagine` call consumes one chunk of actions and returns the next frames with the history and
    the state for the next call. The history is the encoding of the frames that were shown, not of what the transformer
    had in mind: what the decoder kept sharp stays sharp.

    Args:
        vae (`ProphetAutoencoder` or `ProphetCosmosAutoencoder`, *optional*): frames <-> latents. None, and so the
            transformer: a Prophet of the motion alone, see `has_video`.
        transformer (`ProphetTransformer3DModel` or `ProphetCosmosTransformer3DModel`, *optional*): velocity of the
            chunk's latents.
        proprioception (`ProprioceptionModel`): the robot's own state, as one member of an ensemble sees it.
        scheduler (`FlowMatchEulerDiscreteScheduler`): integrates the velocity from noise (sigma 1) to data (sigma 0).
        image_size (`int`): side of the square video, pixels.
        chunk_size (`int`): low-level actions in a chunk.
        frame_stride (`int`): low-level actions between two video frames.
        control_hz (`int`): low-level actions a second.
        num_inference_steps (`int`): default number of sampling steps; one step is the conditional mean.
        cameras (`dict[str, list[list[float]]]`, *optional*): for each suite whose camera is known its 3 x 4 matrix,
            intrinsics times world-to-camera extrinsics, in pixels of the video: through it the estimated end-effector
            poses are drawn as action frames, what the hand carries is moved, and the proprioception looks around. In
            other suites action frames and crops are black, and nothing is carried.
        action_streams (`str`): "both"; "scalars", where no camera is used at all, as for data without cameras; or
            "frames", where the transformer sees the actions only as what the camera shows of them.
        robots (`list[tuple[str, list[str]]]`, *optional*): (name, suites) of each robot, in the order of the slots of
            the proprioception model. The robot of any other suite, that of a user's own start among them, is taken for
            the first one.

    The state of a robot is that of the proprioception model and the hold, see `init_hold`.
    """

    _optional_components = ["vae", "transformer"]  # noqa: RUF012

    def __init__(
        self,
        vae: ProphetAutoencoder | ProphetCosmosAutoencoder | None,
        transformer: ProphetTransformer3DModel | ProphetCosmosTransformer3DModel | None,
        proprioception: ProprioceptionModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        image_size: int = 96,
        chunk_size: int = 8,
        frame_stride: int = 4,
        control_hz: int = 20,
        num_inference_steps: int = 1,
        cameras: dict[str, list[list[float]]] | None = None,
        robots: list[Any] | None = None,
        action_streams: str = "both",
    ) -> None:
        super().__init__()
        if action_streams not in ACTION_STREAMS:
            raise ValueError(f"Unknown action_streams {action_streams!r}; choose one of {ACTION_STREAMS}.")
        body = proprioception.config
        robots = robots or []
        if len(robots) > body.robots:
            raise ValueError(f"The proprioception model has {body.robots} slots, got {len(robots)} robots.")
        if body.frame_stride != frame_stride:
            raise ValueError(
                f"The proprioception model takes {body.frame_stride} actions a frame, and the pipeline has "
                f"frame_stride={frame_stride}: build both with the same."
            )
        if (vae is None) != (transformer is None):
            raise ValueError("vae and transformer make the video together: pass both, or neither for the motion alone.")
        condition_dim = proprioception.condition_dim
        if transformer is not None and transformer.config.condition_dim != condition_dim:
            raise ValueError(
                f"The transformer takes conditions of {transformer.config.condition_dim} numbers, and this "
                f"proprioception model makes {condition_dim}: build it with condition_dim={condition_dim}."
            )
        parts = (proprioception, transformer, vae if isinstance(vae, ProphetAutoencoder) else None)
        hands = {type(part).__name__: part.config.num_arms for part in parts if part is not None}
        if len(set(hands.values())) > 1:
            raise ValueError(f"The models must have the same num_arms, got {hands}.")
        if chunk_size % frame_stride:
            raise ValueError(
                f"chunk_size must be a multiple of frame_stride, got {chunk_size} and {frame_stride}: the episodes "
                "need another number of actions a frame."
            )
        proprioception.float()  # bfloat16 would round its poses to millimetres
        self.register_modules(vae=vae, transformer=transformer, proprioception=proprioception, scheduler=scheduler)
        self.register_to_config(
            image_size=image_size,
            chunk_size=chunk_size,
            frame_stride=frame_stride,
            control_hz=control_hz,
            num_inference_steps=num_inference_steps,
            cameras=cameras or {},
            robots=[[name, list(suites)] for name, suites in robots],
            action_streams=action_streams,
        )
        self.set_progress_bar_config(disable=True)

    @classmethod
    def tiny_random(cls, seed: int = 0, robots: int = 8, num_arms: int = 1) -> "ProphetPipeline":
        """Build an untrained pipeline of the real classes in a very small configuration with so many slots for robots
        of so many arms, for tests."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = ProphetTransformer3DModel(
                latent_channels=4,
                condition_dim=44 * num_arms + robots,
                num_arms=num_arms,
                conv_channels=8,
                conv_blocks=(1, 1),
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=2,
                adaln_lora_dim=8,
            )
            # A zero output layer would make every untrained video a still: give the actions something to move.
            torch.nn.init.normal_(transformer.video_out.weight, std=0.1)
            torch.nn.init.normal_(transformer.action_embed.to_adaln.weight, std=0.1)
            return cls(
                vae=ProphetAutoencoder(4, (8, 8, 16), (0, 0, 0), (0, 0, 0), num_arms=num_arms).eval(),
                transformer=transformer.eval(),
                proprioception=ProprioceptionModel(num_arms=num_arms, hidden_dim=16, width=16, robots=robots).eval(),
                scheduler=FlowMatchEulerDiscreteScheduler(),
                cameras={
                    "libero_object": [[-40.0, 115.0, -25.0, 53.0], [20.0, 0.0, -123.0, 62.0], [-0.8, 0.0, -0.5, 1.1]]
                },
                robots=[("panda", ["libero_object"])],
            )

    def to(self, *args: Any, **kwargs: Any) -> "ProphetPipeline":
        """Move or convert the models, as any diffusers pipeline; the proprioception keeps its float32 weights."""
        kept = {name: weight.clone() for name, weight in self.proprioception.state_dict().items()}
        super().to(*args, **kwargs)
        self.proprioception.float().load_state_dict(kept)
        return self

    @property
    def has_video(self) -> bool:
        """Whether it imagines video: without autoencoder and transformer there is the motion alone (`imagine_motion`),
        as for an environment with `video=False`."""
        return self.transformer is not None

    def require_video(self) -> None:
        """Raise a `ValueError` where there is the motion alone."""
        if not self.has_video:
            raise ValueError(
                "This Prophet has no autoencoder and no transformer: it imagines the motion alone, for environments "
                "with video=False. For pictures take one that has them, such as 'prophet-libero-tiny'."
            )

    @property
    def image_size(self) -> int:
        """Side of the square video, pixels."""
        return self.config.image_size

    @property
    def chunk_size(self) -> int:
        """Low-level actions in a chunk."""
        return self.config.chunk_size

    @property
    def frame_stride(self) -> int:
        """Low-level actions between two video frames."""
        return self.config.frame_stride

    @property
    def chunk_frames(self) -> int:
        """Video frames in a chunk."""
        return self.chunk_size // self.frame_stride

    @property
    def action_dim(self) -> int:
        """Size of one low-level action."""
        return self.proprioception.action_dim

    @property
    def num_arms(self) -> int:
        """Arms K that a robot can have."""
        return self.proprioception.config.num_arms

    def arms(self, suite: str) -> int:
        """Arms of the robot of a suite, the first ones of the K; warns of a suite that it was not trained on."""
        if not any(suite in known for _, known in self.config.robots):
            suites = sorted(suite for _, known in self.config.robots for suite in known)
            warnings.warn(
                f"This Prophet was not trained on {suite!r} (but on {suites}): it takes the robot for the first that "
                "it knows. Adapt it with `prophet adapt`.",
                stacklevel=2,
            )
        return int(self.proprioception.arm_mask[self.robot([suite])][0].nonzero().max()) + 1

    @torch.inference_mode()
    def init_history(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Encode the frames that episodes start from.

        Args:
            images: uint8 (B, H, W, 3), upright RGB, H = W = image_size.

        Returns:
            History latents, float (B, T_h, C, h, w): the start frame, repeated (left padding).

        Raises:
            ValueError: shape or dtype differ from the above, or there is no video, see `has_video`.
        """
        self.require_video()
        images, size = torch.as_tensor(images), self.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (size, size, 3):
            raise ValueError(
                f"Expected images as uint8 (B, {size}, {size}, 3), got {images.dtype} {tuple(images.shape)}."
            )
        pixels = frames_to_pixels(images.to(self.device)).to(self.vae.dtype)
        latents = self.vae.encode(pixels).to(self.transformer.dtype)
        return latents[:, None].repeat(1, self.transformer.buffer_frames, 1, 1, 1)

    @property
    def num_members(self) -> int:
        """Members of the ensemble of the proprioception."""
        return self.proprioception.config.num_members

    def init_state(
        self, proprio: torch.Tensor, member: torch.Tensor | None = None, rehearsed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The state, float32 (B, S), of robots at rest.

        Args:
            proprio: float (B, P), metres and radians.
            member: int64 (B,) in [0, num_members), which member of the ensemble moves each robot; None: the first.
            rehearsed: bool (B,), whether the actions to come answer to what Prophet imagines, as those of who acts in
                it do, or to what really happened, as those of a recorded episode do; None: to what Prophet imagines.
                See `ProprioceptionModel`.

        Raises:
            ValueError: a shape differs, or there is no such member.
        """
        if proprio.ndim != 2 or proprio.shape[1] != self.proprioception.proprio_dim:
            raise ValueError(
                f"Expected proprio of shape (B, {self.proprioception.proprio_dim}), got {tuple(proprio.shape)}."
            )
        if member is not None:
            if member.shape != proprio.shape[:1]:
                raise ValueError(f"Expected one member per robot, ({len(proprio)},), got {tuple(member.shape)}.")
            if len(member) and not 0 <= int(member.min()) <= int(member.max()) < self.num_members:
                raise ValueError(f"Members must be in 0 ... {self.num_members - 1}, got {member.tolist()}.")
        proprio = proprio.to(self.device, torch.float32)
        return torch.cat([self.proprioception.init_state(proprio, member, rehearsed), init_hold(proprio)], dim=1)

    @torch.inference_mode()
    def imagine(
        self,
        history: torch.Tensor,
        state: torch.Tensor,
        actions: torch.Tensor,
        images: np.ndarray | torch.Tensor,
        suites: Sequence[str],
        generator: list[torch.Generator] | torch.Generator | None = None,
        num_inference_steps: int | None = None,
    ) -> ImaginedChunk:
        """Imagine the frames that follow a chunk of actions.

        Args:
            history: float (B, T_h, C, h, w) from `init_history` or from the previous call.
            state: float32 (B, S) from `init_state` or from the previous call.
            actions: float32 (B, chunk_size, action_dim) in [-1, 1].
            images: uint8 (B, 2, H, W, 3), the frame that each episode began with, from which what stands still is
                copied, and the latest one, from which what the hand carries is copied.
            suites: B names, which say through what camera the arm is seen; one of another name is unknown.
            generator: one CPU generator per row, so that a row's video does not depend on its neighbours; or one for
                all.
            num_inference_steps: sampling steps; the pipeline's default if None. One step gives the conditional mean.

        Returns:
            ImaginedChunk.

        Raises:
            ValueError: shapes do not fit together, num_inference_steps < 1, or there is no video, see `has_video`.
        """
        self.require_video()
        self._check_inputs(suites, history=history, state=state, actions=actions, images=images)
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        start, latest = frames_to_pixels(torch.as_tensor(images).to(self.device)).to(self.vae.dtype).unbind(1)
        projection, robot = self.projection(suites).to(self.device), self.robot(suites).to(self.device)
        actions = actions.to(self.device, torch.float32)
        history = history.to(self.device)
        condition, state = self.condition(state.to(self.device, torch.float32), actions, start, projection, robot)
        pixels, _ = self.generate(history, condition, start, latest, generator, num_inference_steps)
        encoded = self.vae.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return ImaginedChunk(
            frames=pixels_to_frames(pixels).cpu(),
            proprio=condition.proprio.cpu(),
            history=advance_history(history, encoded),
            state=state,
        )

    __call__ = imagine

    @torch.inference_mode()
    def imagine_motion(
        self, state: torch.Tensor, actions: torch.Tensor, starts: np.ndarray | torch.Tensor, suites: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Imagine how the robot moves during a chunk of actions, without a picture: the same motion as `imagine`'s.

        Args:
            state, actions, suites: as in `imagine`.
            starts: uint8 (B, H, W, 3), the frame that each episode began with, which says what the arm meets.

        Returns:
            The proprioception at each frame, float32 (B, chunk_frames, P), on the CPU; the state to pass to the next
            call.

        Raises:
            ValueError: shapes do not fit together.
        """
        self._check_inputs(suites, state=state, actions=actions, starts=starts)
        device = self.device  # looks through all modules each time
        projection, robot = self.projection(suites).to(device), self.robot(suites).to(device)
        start = frames_to_pixels(torch.as_tensor(starts).to(device))
        state, actions = state.to(device, torch.float32), actions.to(device, torch.float32)
        poses, _, state = self._move(state, actions, start, projection, robot)
        return poses[:, 1:].cpu(), state

    def replay(
        self,
        images: np.ndarray | torch.Tensor,
        proprio: torch.Tensor,
        actions: torch.Tensor,
        suites: Sequence[str],
        generator: list[torch.Generator] | torch.Generator | None = None,
        num_inference_steps: int | None = None,
        member: torch.Tensor | None = None,
        rehearsed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Imagine whole episodes open loop, Prophet's own frames fed back.

        Args:
            images: uint8 (B, H, W, 3) start frames. proprio: float32 (B, P).
            actions: float32 (B, N, A); N is a multiple of chunk_size.
            suites, generator, num_inference_steps: as in `imagine`. member, rehearsed: as in `init_state`.

        Returns:
            Frames uint8 (B, 1 + N / frame_stride, H, W, 3), the start frame first, and the proprioception at each of
            them, the given one first and then the estimates, float32 (B, 1 + N / frame_stride, P), on the CPU.

        Raises:
            ValueError: N is not a multiple of chunk_size, or a shape does not fit.
        """
        if actions.shape[1] % self.chunk_size:
            raise ValueError(f"Expected a multiple of {self.chunk_size} actions, got {actions.shape[1]}.")
        clip, poses = [torch.as_tensor(images)[:, None]], [proprio[:, None].float().cpu()]
        history, state = self.init_history(images), self.init_state(proprio, member, rehearsed)
        for chunk in actions.split(self.chunk_size, dim=1):
            latest = torch.stack([clip[0][:, 0], clip[-1][:, -1]], dim=1)
            imagined = self.imagine(history, state, chunk, latest, suites, generator, num_inference_steps)
            history, state = imagined.history, imagined.state
            clip.append(imagined.frames)
            poses.append(imagined.proprio)
        return torch.cat(clip, dim=1), torch.cat(poses, dim=1)

    def condition(
        self,
        state: torch.Tensor,
        actions: torch.Tensor,
        start: torch.Tensor,
        projection: torch.Tensor,
        robot: torch.Tensor,
    ) -> tuple[ChunkCondition, torch.Tensor]:
        """Roll the state through a chunk.

        Args:
            state: float32 (B, S). actions: float32 (B, chunk_size, action_dim).
            start: pixels (B, 3, H, W) in [-1, 1], the episode's first frame.
            projection: float32 (B, K, 3, 4). robot: int64 (B,), slots.

        Returns:
            What follows for the chunk's frames; the state after the chunk, float32 (B, S).
        """
        poses, holds, state = self._move(state, actions, start.float(), projection, robot)
        frame_actions = actions.unflatten(1, (self.chunk_frames, self.frame_stride))
        return self.observed_condition(poses, holds, frame_actions, projection, robot), state

    def _move(
        self,
        state: torch.Tensor,
        actions: torch.Tensor,
        start: torch.Tensor,
        projection: torch.Tensor,
        robot: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Poses (B, 1 + F, P) at the present and at the chunk's frames, holds (B, F, 7 K) at these, the state after."""
        proprio_dim, state_dim = self.proprioception.proprio_dim, self.proprioception.state_dim
        body, hold = state[:, :state_dim], state[:, state_dim:]
        poses, holds = [body[:, :proprio_dim]], []
        for frame_actions in actions.split(self.frame_stride, dim=1):
            body = self.proprioception(body, frame_actions, start, projection, robot)
            hold = update_hold(hold, body[:, :proprio_dim], frame_actions)
            poses.append(body[:, :proprio_dim])
            holds.append(hold)
        return torch.stack(poses, dim=1), torch.stack(holds, dim=1), torch.cat([body, hold], dim=1)

    def observed_condition(
        self,
        poses: torch.Tensor,
        holds: torch.Tensor,
        actions: torch.Tensor,
        projection: torch.Tensor,
        robot: torch.Tensor,
    ) -> ChunkCondition:
        """The conditions of a chunk whose proprioception is known.

        Args:
            poses: float32 (B, 1 + F, P), proprioception at the present and at each frame.
            holds: float32 (B, F, 7 K), see `init_hold`, at each frame.
            actions: float32 (B, F, frame_stride, A). projection: float32 (B, K, 3, 4). robot: int64 (B,), slots.
        """
        scalars = frame_condition(self.proprioception, poses[:, :-1], poses[:, 1:], actions, robot)
        return ChunkCondition(
            proprio=poses[:, 1:],
            scalars=torch.zeros_like(scalars) if self.config.action_streams == "frames" else scalars,
            action_frames=draw_action_frames(poses, projection, self.image_size),
            motion=carried_motion(poses[:, :1], poses[:, 1:], holds, projection),
        )

    def generate(
        self,
        history: torch.Tensor,
        condition: ChunkCondition,
        start: torch.Tensor,
        latest: torch.Tensor,
        generator: list[torch.Generator] | torch.Generator | None = None,
        num_inference_steps: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Denoise and decode a chunk.

        Args:
            history, generator, num_inference_steps: as in `imagine`.
            condition: of the chunk. start, latest: pixels (B, 3, H, W) in [-1, 1].

        Returns:
            Pixels (B, F, 3, H, W) in [-1, 1], and the latents that they were decoded from, (B, F, C, h, w).
        """
        device, dtype = self.transformer.device, self.transformer.dtype
        batch, _, channels, height, width = history.shape
        conditions = (
            history.to(device, dtype),
            condition.scalars.to(dtype),
            condition.action_frames.to(dtype),
            carry_latents(history, condition.motion, self.vae.spatial_compression).to(device, dtype),
        )

        # 1. Latent noise
        shape = (batch, self.chunk_frames, channels, height, width)
        latents = randn_tensor(shape, generator=generator, device=torch.device("cpu")).to(device, dtype)

        # 2. Denoising loop
        steps = num_inference_steps or self.config.num_inference_steps
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), device=device)
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            sigma = self.scheduler.sigmas[index].to(device, dtype).expand(batch)
            velocity = self.transformer(latents.to(dtype), sigma, *conditions)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]

        # 3. Decode
        carried = carry(torch.stack([latest, start], dim=1), condition.motion)
        drawn = condition.action_frames[:, 1:].to(self.vae.dtype)
        pixels = self.vae.decode(latents.to(self.vae.dtype), start, carried.to(self.vae.dtype), drawn)
        return pixels.clamp(-1, 1), latents

    def projection(self, suites: Sequence[str]) -> torch.Tensor:
        """The camera of each arm in some episodes, float32 (B, K, 3, 4); zeros where it is not known or not used, or
        where the robot has no such arm."""
        cameras = {} if self.config.action_streams == "scalars" else self.config.cameras
        projection = projections_of(cameras, suites)
        return projection[:, None] * self.proprioception.arm_mask.cpu()[self.robot(suites), :, None, None]

    def robot(self, suites: Sequence[str]) -> torch.Tensor:
        """The slots of the robots of some episodes, int64 (B,)."""
        slots = {suite: slot for slot, (_, known) in enumerate(self.config.robots) for suite in known}
        return torch.tensor([slots.get(suite, 0) for suite in suites])

    def _check_inputs(self, suites: Sequence[str], **values: np.ndarray | torch.Tensor) -> None:
        batch, size = len(values["state"]), self.image_size
        expected = {
            "state": (batch, self.proprioception.state_dim + self.num_arms * HOLD_DIM),
            "actions": (batch, self.chunk_size, self.action_dim),
            "images": (batch, 2, size, size, 3),
            "starts": (batch, size, size, 3),
        }
        if "history" in values:
            channels = self.transformer.config.latent_channels
            expected["history"] = (batch, self.transformer.buffer_frames, channels) + (size // 8,) * 2
        for name, value in values.items():
            if tuple(value.shape) != expected[name]:
                raise ValueError(f"Expected {name} of shape {expected[name]}, got {tuple(value.shape)}.")
            if name in ("images", "starts") and torch.as_tensor(value[:0]).dtype != torch.uint8:
                raise ValueError(f"Expected {name} as uint8, got {value.dtype}.")
        if isinstance(suites, str) or len(suites) != batch:
            raise ValueError(f"Expected one suite per episode, {batch} in all, got {suites!r}.")


def carry_latents(history: torch.Tensor, motion: torch.Tensor, compression: int) -> torch.Tensor:
    """The latest and the first frame of a history (B, T_h, C, h, w), moved as in `ChunkCondition.motion`.

    Args:
        motion: float32 (B, F, 2 K, 3), in pixels. compression: pixels in the side of a latent.

    Returns:
        float (B, F, 2 K, C, h, w).
    """
    in_latents = motion / motion.new_tensor([compression, compression, 1.0])
    return carry(torch.stack([history[:, -1], history[:, 0]], dim=1), in_latents)


def frame_condition(
    model: ProprioceptionModel,
    before: torch.Tensor,
    after: torch.Tensor,
    actions: torch.Tensor,
    robot: torch.Tensor,
) -> torch.Tensor:
    """Assemble the conditions of some frames.

    Args:
        before, after: float32 (B, F, P), proprioception before and after each frame.
        actions: float32 (B, F, stride, A), of each frame. robot: int64 (B,), slots.

    Returns:
        float (B, F, stride * A + 2 P + R): the actions that the robot obeys, its standardised proprioception, and which
        robot it is.
    """
    masked = actions * model.action_mask[robot][:, None, None]
    poses = [model.normalize(before, robot), model.normalize(after, robot)]
    which = F.one_hot(robot, model.config.robots).to(before)[:, None].expand(-1, before.shape[1], -1)
    return torch.cat([masked.flatten(-2), *poses, which], dim=-1)
