"""What a rank can be asked to do. Each task takes a RankContext and returns its results as plain values."""

from launcher.config import TaskKind
from launcher.tasks import bench, calibrate, generate, predictions, probe

TASKS = {
    TaskKind.generate: generate.run_generate,
    TaskKind.probe: probe.run_probe,
    TaskKind.calibrate: calibrate.run_calibrate,
    TaskKind.bench: bench.run_bench,
    TaskKind.predictions: predictions.run_predictions,
}
