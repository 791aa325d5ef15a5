"""request -> scheduler -> runner -> output. Plain Python and numpy."""

from martlet.engine.async_engine import AsyncEngine
from martlet.engine.engine import Engine
from martlet.engine.options import EngineOptions
from martlet.engine.request import Output, Request, Stats

__all__ = ["AsyncEngine", "Engine", "EngineOptions", "Output", "Request", "Stats"]
