"""What pyproject.toml cannot say: which folders are packages, and that the index travels inside one of them."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

INDEX = "pretrained_index.yaml"


class BuildWithIndex(build_py):
    """Copies the index, at the top of the repository where people look for it, into the package.

    An editable install copies nothing: `saekit.pretrained.index_path` finds the file where it lies.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(INDEX, f"{self.build_lib}/saekit/{INDEX}")

    def get_source_files(self):
        return [*super().get_source_files(), INDEX]


setup(
    packages=[*find_packages(include=["saekit", "saekit.*"]), "saekit_cli"],
    package_dir={"saekit_cli": "cli"},  # a module called `cli` must not land in site-packages
    cmdclass={"build_py": BuildWithIndex},
)
