"""Group rollouts with the flow chains that produced their actions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fagrpo.advantages import group_advantages
from fagrpo.flow_sde import FlowChain

ADVANTAGES = ("episode", "step")


@dataclass(frozen=True)
class GroupRolloutSamples:
    """A minibatch of environment actions.

    :param observations: tensor or dict of tensors, B rows
    :param chain: the flow chains of the B actions, in flow units
    :param advantages: float32 (B,)
    :param action_mask: bool (B, \\*A), False where an action was not executed
    """

    observations: Tensor | dict[str, Tensor]
    chain: FlowChain
    advantages: Tensor
    action_mask: Tensor

    def __len__(self) -> int:
        return len(self.advantages)

    def rows(self, index: slice) -> "GroupRolloutSamples":
        """Some rows, for micro-batches."""
        if isinstance(self.observations, dict):
            observations: Tensor | dict[str, Tensor] = {key: value[index] for key, value in self.observations.items()}
        else:
            observations = self.observations[index]
        return GroupRolloutSamples(
            observations, self.chain.rows(index), self.advantages[index], self.action_mask[index]
        )


class GroupRolloutBuffer:
    """Stores one rollout: a row per executed environment action, whatever the episodes' lengths.

    Steps after an episode's end are never added, which is their mask. Rows belong to episodes and episodes to groups
    that share a start. ``successes`` maps finished episodes to their is_success, for the statistics. Nothing in here
    is sampled with replacement and nothing is normalised before :meth:`finish`.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._observations: list[np.ndarray | dict[str, np.ndarray]] = []
        self._chains: list[FlowChain] = []
        self._episodes: list[np.ndarray] = []
        self._steps: list[np.ndarray] = []
        self._rewards: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._groups: dict[int, int] = {}
        self.successes: dict[int, bool] = {}
        self.samples: GroupRolloutSamples | None = None

    def start_episode(self, episode: int, group: int) -> None:
        """Declare an episode.

        :param episode: a number of its own
        :param group: episodes of one group share their start
        """
        self._groups[episode] = group

    def add(
        self,
        observations: np.ndarray | dict[str, np.ndarray],
        chain: FlowChain,
        episodes: np.ndarray,
        steps: np.ndarray,
        rewards: np.ndarray,
        action_mask: np.ndarray,
    ) -> None:
        """Add one environment step of B running episodes.

        :param observations: what the policy saw, B rows; copied
        :param chain: B flow chains
        :param episodes: int (B,), declared by :meth:`start_episode`
        :param steps: int (B,), the number of the step in its episode
        :param rewards: float (B,)
        :param action_mask: bool (B, \\*A)
        """
        if isinstance(observations, dict):
            self._observations.append({key: np.array(value) for key, value in observations.items()})
        else:
            self._observations.append(np.array(observations))
        self._chains.append(chain.to("cpu"))
        self._episodes.append(np.array(episodes))
        self._steps.append(np.array(steps))
        self._rewards.append(np.array(rewards, dtype=np.float64))
        self._masks.append(np.array(action_mask))

    def __len__(self) -> int:
        return sum(len(episodes) for episodes in self._episodes)

    def finish(
        self,
        gamma: float = 1.0,
        advantage: str = "episode",
        eps: float = 1e-6,
        drop_episodes: frozenset[int] = frozenset(),
    ) -> dict[str, float]:
        """Compute group-relative advantages and keep the rows that carry any signal in :attr:`samples`.

        :param gamma: discount of rewards
        :param advantage: "episode": the discounted return of the episode, compared over the episodes of its group and
            given to all its steps; "step": the discounted return from each step on, compared over the group at the
            same step number
        :param eps: see :func:`fagrpo.advantages.group_advantages`
        :param drop_episodes: episodes to leave out (cut off by the end of the collection)
        :return: return_mean, group_success_std (mean over groups of the std of is_success, or of returns where the
            environment reports no success), informative_groups, groups, largest_group (episodes)
        :raises ValueError: an unknown kind of advantage, or an empty buffer
        """
        if advantage not in ADVANTAGES:
            raise ValueError(f"unknown advantage {advantage!r}; choose one of {', '.join(ADVANTAGES)}")
        if not self._episodes:
            raise ValueError("the rollout buffer is empty")
        episodes = np.concatenate(self._episodes)
        steps = np.concatenate(self._steps)
        rewards = np.concatenate(self._rewards)
        names, row_episode = np.unique(episodes, return_inverse=True)
        groups = np.array([self._groups[int(name)] for name in names])
        kept = np.array([int(name) not in drop_episodes for name in names])

        returns = np.zeros(len(names))
        np.add.at(returns, row_episode, rewards * gamma**steps)
        row_advantages = torch.zeros(len(episodes))
        row_mask = np.zeros(len(episodes), dtype=bool)
        row_kept = kept[row_episode]
        if advantage == "episode":
            values, mask = group_advantages(torch.from_numpy(returns[kept]), torch.from_numpy(groups[kept]), eps)
            episode_values, episode_mask = np.zeros(len(names)), np.zeros(len(names), dtype=bool)
            episode_values[kept], episode_mask[kept] = values.numpy(), mask.numpy()
            row_advantages = torch.from_numpy(episode_values[row_episode])
            row_mask = episode_mask[row_episode]
        else:
            to_go = np.zeros(len(episodes))
            order = np.lexsort((-steps, row_episode))  # each episode from its last step backwards
            following, previous = 0.0, -1
            for row in order:
                following = rewards[row] + (gamma * following if row_episode[row] == previous else 0.0)
                to_go[row], previous = following, row_episode[row]
            compared = groups[row_episode] * (int(steps.max()) + 1) + steps
            values, mask = group_advantages(
                torch.from_numpy(to_go[row_kept]), torch.from_numpy(compared[row_kept]), eps
            )
            row_advantages[torch.from_numpy(row_kept)] = values.float()
            row_mask[row_kept] = mask.numpy()

        outcomes = returns
        if self.successes:
            outcomes = np.array([float(self.successes.get(int(name), False)) for name in names])
        spreads = [outcomes[kept & (groups == group)].std() for group in np.unique(groups[kept])]
        index = torch.from_numpy(np.flatnonzero(row_mask))
        self._keep(index, row_advantages.float())
        informative = np.unique(groups[row_episode[row_mask]])
        return {
            "return_mean": float(returns[kept].mean()) if kept.any() else float("nan"),
            "group_success_std": float(np.mean(spreads)) if spreads else float("nan"),
            "informative_groups": float(len(informative)),
            "groups": float(len(spreads)),
            "largest_group": float(np.bincount(groups[kept]).max(initial=0)),
        }

    def _keep(self, index: Tensor, advantages: Tensor) -> None:
        first = self._observations[0]
        observations: Tensor | dict[str, Tensor]
        rows = index.numpy()
        if isinstance(first, dict):
            observations = {
                key: torch.from_numpy(np.concatenate([obs[key] for obs in self._observations])[rows])  # type: ignore[index]
                for key in first
            }
        else:
            observations = torch.from_numpy(np.concatenate(self._observations)[rows])  # type: ignore[arg-type]
        chain = FlowChain.concatenate(self._chains).rows(index)
        mask = torch.from_numpy(np.concatenate(self._masks)[rows])
        self.samples = GroupRolloutSamples(observations, chain, advantages[index], mask)
        self._observations, self._chains, self._masks = [], [], []

    def minibatches(
        self, batch_size: int | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[GroupRolloutSamples]:
        """The informative rows in random order, each once.

        :param batch_size: rows per minibatch (the last one may be smaller); None: all at once
        :param generator: of the order
        :param device: where the minibatch goes
        :raises ValueError: called before :meth:`finish`
        """
        if self.samples is None:
            raise ValueError("call finish() before drawing minibatches")
        samples = self.samples
        for index in torch.randperm(len(samples), generator=generator).split(batch_size or max(1, len(samples))):
            observations: Tensor | dict[str, Tensor]
            if isinstance(samples.observations, dict):
                observations = {key: value[index].to(device) for key, value in samples.observations.items()}
            else:
                observations = samples.observations[index].to(device)
            yield GroupRolloutSamples(
                observations,
                samples.chain.rows(index).to(device),
                samples.advantages[index].to(device),
                samples.action_mask[index].to(device),
            )
