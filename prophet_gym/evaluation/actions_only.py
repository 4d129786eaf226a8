"""The control of every outcome agreement: how much do the actions alone, without any world model, say about success?"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from prophet_gym.data.clips import EpisodeArrays
from prophet_gym.data.instructions import embed_instructions
from prophet_gym.reward.success_classifier import SequenceWitness

STEPS, BATCH_SIZE = 1000, 64


def predict_from_actions(train_arrays: EpisodeArrays, arrays: EpisodeArrays, chunk_frames: int) -> NDArray[np.float64]:
    """Train the control on some episodes, the same way each time, and let it judge others.

    Args:
        train_arrays: episodes with frame-wise verdicts; their frames are not looked at.
        arrays: E episodes to judge, up to the last whole chunk of the shortest.
        chunk_frames: frames in a chunk.

    Returns:
        Probability of success at the end of each chunk, (E, C).
    """
    actions, embeddings, after = _inputs(train_arrays, int(train_arrays.lengths.max()) - 1)
    solved = train_arrays.success[after].float()
    steps = train_arrays.lengths - 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SequenceWitness(actions.shape[-1], embeddings.shape[-1])
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(actions), (BATCH_SIZE,))
            noisy = actions[rows] + 0.03 * torch.randn(BATCH_SIZE, 1, actions.shape[-1])
            inside = torch.arange(actions.shape[1]) < steps[rows, None]  # the shorter episodes repeat their last step
            logits = network(noisy, embeddings[rows])[0][inside]
            loss = F.binary_cross_entropy_with_logits(logits, solved[rows][inside])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        actions, embeddings, _ = _inputs(arrays, int(arrays.lengths.min()) - 1)
        probability = torch.sigmoid(network.eval()(actions, embeddings)[0])
    return probability[:, chunk_frames - 1 :: chunk_frames].double().numpy()


def _inputs(arrays: EpisodeArrays, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean action of so many video steps, (E, T, A), the last one repeated in shorter episodes, the instruction's
    embedding, (E, D), and the row of the frame after each step, int64 (E, T)."""
    index = arrays.starts[:, None] + torch.arange(length).minimum(arrays.lengths[:, None] - 2)
    embeddings = embed_instructions(arrays.instructions)
    return arrays.actions[index].mean(2), torch.from_numpy(embeddings), index + 1
