"""A second opinion while a policy is trained: what a Prophet says of it that does not reward it."""

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from prophet_gym.data.episode import SPLITS
from prophet_gym.evaluation.policy_success import Rollouts, evaluate_in_prophet, starts_of


class HeldOutCallback(BaseCallback):
    """Evaluate a policy every so often in a world model that it is not trained in.

    Of what a policy gains by the errors of the Prophet that rewards it, another one, whose motion was trained apart,
    sees a part (compare the validation in learned models of Kurutach et al. 2018, arXiv 1802.10592). If success rises
    where the policy is trained and not here, it begins to exploit: stop, or go back to an earlier checkpoint. Logged as
    `held_out/expected_rate` and `held_out/success_rate`, see `Rollouts`.

    The motion alone is imagined, for policies that need no image, from each validation start, without noise in the
    actions; of an algorithm with an `average_policy`, as `FAGRPO` has with `ema_decay`, this is what acts.

    Args:
        suite: task suite of LIBERO. every: environment steps between two evaluations; there is one before the first.
        world_model, reward_model: name in the wheel, path or object, as of the environments.

    Attributes:
        history: (environment steps, outcome) of each evaluation.
    """

    def __init__(
        self,
        suite: str = "libero_object",
        every: int = 20_000,
        world_model: Any = "prophet-libero-heldout",
        reward_model: Any = "reward-libero",
    ) -> None:
        super().__init__()
        self.suite, self.every = suite, every
        self.models = {"world_model": world_model, "reward_model": reward_model}
        self.history: list[tuple[int, Rollouts]] = []

    def _on_rollout_start(self) -> None:
        if not self.history or self.num_timesteps - self.history[-1][0] >= self.every:
            self._evaluate()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self.history[-1][0] < self.num_timesteps:
            self._evaluate()
            self.logger.dump(self.num_timesteps)

    def _evaluate(self) -> None:
        policy = getattr(self.model, "average_policy", None) or self.model.policy
        starts = starts_of(range(10), SPLITS["val"])
        outcome = evaluate_in_prophet(policy, self.suite, starts, video=False, deterministic=True, **self.models)
        self.history.append((self.num_timesteps, outcome))
        self.logger.record("held_out/expected_rate", outcome.expected_rate)
        self.logger.record("held_out/success_rate", outcome.rate)
