"""What a policy in training is worth in a Prophet, which may be another one than that which rewards it."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from prophet_gym.data.instructions import EMBEDDING_DIM
from prophet_gym.envs.start_states import load_start_states
from prophet_gym.evaluation.policy_success import Rollouts, evaluate_in_prophet


class ProphetEvalCallback(BaseCallback):
    """Evaluate a policy every so often, in another world model than the one that it is trained in, if asked to.

    Of what a policy gains by the errors of the Prophet that rewards it, one whose motion was trained apart sees a part
    (compare the validation in learned models of Kurutach et al. 2018, arXiv 1802.10592). If the expected rate rises in
    the one and not in the other, the policy begins to exploit: stop, or go back to an earlier checkpoint. What it gains
    by the errors of the judge, which both share unless told otherwise, neither sees.

    The motion alone is imagined, without noise in the actions, from each validation start; of an algorithm with an
    `average_policy`, as `FAGRPO` has with `ema_decay`, this is what acts. So it is for policies whose observations are
    those of environments with `video=False`, neither stacked nor normalised. Logged as `NAME/expected_rate` and
    `NAME/success_rate`, see `Rollouts`.

    Args:
        name: of the log's entries.
        suite: task suite. task: number or name of the only task; None: all.
        every: environment steps between two evaluations; the first one is before training, the last one after it.
        start_states: parquet file of start states; None is the one in the wheel.
        env_arguments: further arguments of `ProphetVectorEnv`, `world_model` and `reward_model` among them.

    Attributes:
        history: (environment steps, outcome) of each evaluation of the latest training.

    Raises:
        ValueError: every is below 1, an unknown suite or task; as training begins, observations of another kind.
    """

    def __init__(
        self,
        name: str = "held_out",
        *,
        suite: str = "libero_object",
        task: int | str | None = None,
        every: int = 25_000,
        start_states: Any = None,
        verbose: int = 0,
        **env_arguments: Any,
    ) -> None:
        super().__init__(verbose)
        if every < 1:
            raise ValueError(f"every must be at least 1 environment step, got {every}.")
        table = load_start_states(start_states)
        self.starts = table.pairs(suite, "val")
        if task is not None:
            self.starts = self.starts[self.starts[:, 0] == table.task_number(suite, "val", task)]
        self.name, self.suite, self.every = name, suite, every
        self.env_arguments = env_arguments | {"start_states": start_states, "video": False}
        self.history: list[tuple[int, Rollouts]] = []
        self._trained = False  # since the latest evaluation

    def _on_training_start(self) -> None:
        self.history = []
        normalize, space = self.model.get_vec_normalize_env(), self.model.observation_space
        shapes = {key: part.shape for key, part in space.spaces.items()} if isinstance(space, spaces.Dict) else {}
        if shapes.get("instruction") != (EMBEDDING_DIM,) or "image" in shapes or (normalize and normalize.norm_obs):
            raise ValueError(
                "This evaluation imagines the motion alone. Train on a Prophet environment with video=False, without "
                f"VecFrameStack, and without VecNormalize for observations; got {space}."
            )

    def _on_rollout_start(self) -> None:
        if not self.history or self.num_timesteps - self.history[-1][0] >= self.every:
            self._evaluate()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._trained = True

    def _on_training_end(self) -> None:
        if self._trained:
            self._evaluate()

    def _evaluate(self) -> None:
        policy: Any = getattr(self.model, "average_policy", None) or self.model.policy
        outcome = evaluate_in_prophet(
            policy, self.suite, self.starts, split="val", deterministic=True, progress_bar=False, **self.env_arguments
        )
        self.history.append((self.num_timesteps, outcome))
        self._trained = False
        if self.verbose:
            print(f"{self.name}, {self.num_timesteps} steps: {outcome}")
        self.logger.record(f"{self.name}/expected_rate", outcome.expected_rate)
        self.logger.record(f"{self.name}/success_rate", outcome.rate)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
