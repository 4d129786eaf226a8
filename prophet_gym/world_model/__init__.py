"""Prophet, the learned world model."""

from prophet_gym.world_model.autoencoder import ProphetAutoencoder
from prophet_gym.world_model.cosmos import ProphetCosmosAutoencoder, ProphetCosmosTransformer3DModel
from prophet_gym.world_model.pipeline import ImaginedChunk, ProphetPipeline
from prophet_gym.world_model.proprioception import ProprioceptionModel
from prophet_gym.world_model.transformer import ProphetTransformer3DModel

__all__ = [
    "ImaginedChunk",
    "ProphetAutoencoder",
    "ProphetCosmosAutoencoder",
    "ProphetCosmosTransformer3DModel",
    "ProphetPipeline",
    "ProphetTransformer3DModel",
    "ProprioceptionModel",
]
