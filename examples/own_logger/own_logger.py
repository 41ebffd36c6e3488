from jaxmodels import Logger


class Losses(Logger):
    """Losses alone, in losses.txt."""

    def start(self, run, config, step):
        self.path, self.lines = run / "losses.txt", []

    def scalars(self, step, values):
        self.lines += [f"{step} {name} {value:.4f}\n" for name, value in values.items() if name.endswith("/loss")]

    def flush(self):
        with self.path.open("a") as file:
            file.writelines(self.lines)
        self.lines.clear()

    close = flush
