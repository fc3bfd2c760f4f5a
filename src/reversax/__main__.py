"""The command line: `python -m reversax`, or `reversax`."""

try:
    from .compare._command import app
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "rich", "typer"):
        raise
    raise SystemExit(
        f"The command `reversax` needs the package {error.name}. All it needs comes "
        "with the extra `compare`. In a checkout of reversax: pip install '.[compare]'"
    ) from None


def main() -> None:
    app(prog_name="reversax")


if __name__ == "__main__":
    main()
