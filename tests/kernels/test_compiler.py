"""The compiler: every kernel for every architecture, without a GPU; its errors; and a cache that is never wrong."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from warpcache.kernels import compiler
from warpcache.kernels.compiler import ARCHITECTURES, cache_folder, cached_cubin, compile_cubin
from warpcache.kernels.errors import BackendError

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SOURCES = sorted(path.name for path in KERNELS.glob("*.cu"))
SCALE = 'extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }'
ADD = 'extern "C" __global__ void add(float* x) { x[threadIdx.x] += 1.0f; }'


def sections(cubin: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit little-endian ELF file, by name."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = cubin[headers[names_index][4] :]
    return {names[h[0] :].split(b"\0", 1)[0].decode(): cubin[h[4] : h[4] + h[5]] for h in headers}


class TestCompile:
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("source", SOURCES)
    def test_every_kernel_for_every_architecture(self, source: str, arch: str) -> None:
        text = (KERNELS / source).read_text("utf-8")
        kernels = re.findall(r'extern "C" __global__ void (\w+)\(', text)
        assert kernels
        found = sections(compile_cubin(text, arch, name=source))
        for kernel in kernels:
            assert found[f".text.{kernel}"]

    def test_there_are_kernels(self) -> None:
        assert {"image.cu", "change.cu", "finite.cu", "warp.cu", "rasterizer.cu"} <= set(SOURCES)

    def test_machine_code_is_the_architectures_own(self) -> None:
        codes = {sections(compile_cubin(ADD, arch))[".text.add"] for arch in ("sm_75", "sm_90", "sm_120")}
        assert len(codes) == 3

    def test_macros_reach_the_compiler(self) -> None:
        two, three = (sections(compile_cubin(SCALE, "sm_90", defines={"FACTOR": value})) for value in ("2.0f", 3))
        assert two[".text.scale"] != three[".text.scale"]

    def test_multiply_and_add_are_not_fused(self) -> None:
        # The kernels' references count on it: code of plain operators is code of the ones rounded each.
        plain, rounded, fused = (
            sections(compile_cubin(f'extern "C" __global__ void k(float* x) {{ x[3] = {text}; }}', "sm_90"))[".text.k"]
            for text in ("x[0] * x[1] + x[2]", "__fadd_rn(__fmul_rn(x[0], x[1]), x[2])", "__fmaf_rn(x[0], x[1], x[2])")
        )
        assert plain == rounded
        assert plain != fused


def ptx(source: str) -> str:
    """What NVRTC makes before the machine code; cuda.core does so only with a driver."""
    from cuda.bindings import nvrtc

    code, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    assert code == 0
    options = [b"--gpu-architecture=compute_90", b"-std=c++17", b"-fmad=false"]
    options.append(b"-I" + str(compiler._header_directory()).encode())
    assert nvrtc.nvrtcCompileProgram(program, len(options), options) == (0,)
    text = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text.decode()


class TestQuality:
    """What costs a kernel its bandwidth, and shows in no result."""

    @pytest.mark.parametrize("source", ["image.cu", "change.cu", "warp.cu"])
    def test_no_thread_copies_its_arguments_to_local_memory(self, source: str) -> None:
        # An argument's array that is indexed by a variable is copied, thread by thread.
        assert "__local_depot" not in ptx((KERNELS / source).read_text("utf-8"))
        spoilt = (
            'struct P { int n; int a[8]; }; extern "C" __global__ void k(P p) { p.a[p.n] = 1; p.a[0] = p.a[p.n + 1]; '
        )
        assert "__local_depot" in ptx(spoilt + "*(int*)8 = p.a[threadIdx.x]; }")

    @pytest.mark.parametrize("source", ["image.cu", "change.cu", "finite.cu"])
    def test_groups_are_moved_at_once(self, source: str) -> None:
        text = ptx((KERNELS / source).read_text("utf-8"))
        assert "ld.global.v4.f32" in text or "ld.global.v4.u32" in text
        # Addresses that the compiler cannot tell to be global memory's cost it a look-up.
        assert not re.search(r"\b(ld|st)\.(v4\.)?(u8|u16|u32|f32)", text)


class TestErrors:
    def test_the_log_names_the_line(self) -> None:
        with pytest.raises(BackendError, match=r"^broken\.cu does not compile for sm_90") as caught:
            compile_cubin('\nextern "C" __global__ void k() { nonsense(); }', "sm_90", name="broken.cu")
        assert "broken.cu(2): error" in str(caught.value)
        assert "nonsense" in str(caught.value)

    @pytest.mark.parametrize("arch", ["89", "sm89", "compute_89", "sm_", "sm_89a", ""])
    def test_what_is_no_architecture(self, arch: str) -> None:
        with pytest.raises(BackendError, match=f"^'{arch}' is no GPU architecture"):
            compile_cubin(ADD, arch)

    @pytest.mark.parametrize("arch", ["sm_50", "sm_999"])
    def test_an_architecture_that_nvrtc_does_not_know(self, arch: str) -> None:
        with pytest.raises(BackendError, match=rf"^NVRTC \d+\.\d+ cannot compile for {arch}; it knows sm_75, "):
            compile_cubin(ADD, arch)

    def test_headers_are_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiler, "_header_directory", lambda: None)
        with pytest.raises(BackendError, match=r"^half\.cu needs CUDA's headers, and none were found; .*nvidia-cuda-r"):
            compile_cubin("#include <cuda_fp16.h>\n" + ADD, "sm_90", name="half.cu")
        assert compile_cubin(ADD, "sm_90")

    def test_a_header_of_nobodys_is_the_sources_fault(self) -> None:
        with pytest.raises(BackendError, match=r"^kernel\.cu does not compile for sm_90"):
            compile_cubin("#include <nobodys.h>\n" + ADD, "sm_90")

    @pytest.mark.parametrize(
        ("blocked", "message"),
        [
            ("cuda.core", "cuda-python cannot be imported ("),
            ("cuda.bindings.nvrtc", "cuda-python cannot be imported ("),
        ],
    )
    def test_cuda_python_is_missing(
        self, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch, blocked: str, message: str
    ) -> None:
        monkeypatch.setitem(sys.modules, blocked, None)
        with pytest.raises(BackendError) as caught:
            compile_cubin(ADD, "sm_90")
        assert str(caught.value).startswith(message)
        assert 'pip install "warpcache[cuda]"' in str(caught.value)

    def test_nvrtc_is_missing(self, without_nvrtc: None) -> None:
        with pytest.raises(BackendError, match=r"^NVRTC, CUDA's run-time compiler, was not found \(no libnvrtc"):
            compile_cubin(ADD, "sm_90")


@pytest.fixture
def fresh_compiler() -> Any:
    """What the compiler remembers of its libraries is forgotten, before and after."""
    remembered = (compiler._cuda_core, compiler._nvrtc, compiler._compiler_version)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def without_nvrtc(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def missing() -> None:
        # As cuda-pathfinder's DynamicLibNotFoundError, which is a RuntimeError, says it.
        raise RuntimeError("no libnvrtc anywhere\nand more lines")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled rather than taken from the cache, by source."""
    sources: list[str] = []

    def counting(source: str, arch: str, **options: Any) -> bytes:
        sources.append(source)
        return compile_cubin(source, arch, **options)

    monkeypatch.setattr(compiler, "compile_cubin", counting)
    return sources


class TestCache:
    def test_the_second_time_nothing_is_compiled(self, tmp_path: Path, compiled: list[str]) -> None:
        first = cached_cubin(ADD, "sm_90", folder=tmp_path / "new" / "folder")
        assert first == compile_cubin(ADD, "sm_90", name="kernel.cu")
        assert cached_cubin(ADD, "sm_90", folder=tmp_path / "new" / "folder") == first
        assert compiled == [ADD]

    def test_whatever_reaches_the_compiler_is_another_entry(self, tmp_path: Path, compiled: list[str]) -> None:
        variants: list[tuple[str, str, dict[str, str | int]]] = [
            (SCALE, "sm_90", {"FACTOR": 1}),
            (SCALE, "sm_90", {"FACTOR": 11}),
            (SCALE, "sm_89", {"FACTOR": 1}),
            (SCALE + " ", "sm_90", {"FACTOR": 1}),
            (SCALE, "sm_90", {"FACTOR": 1, "OTHER": 1}),
            (SCALE, "sm_90", {"FACTOR": "1OTHER=1"}),
        ]
        for source, arch, defines in variants[:-1]:
            cached_cubin(source, arch, defines=defines, folder=tmp_path)
        assert len(compiled) == len(list(tmp_path.iterdir())) == len(variants) - 1
        names = {compiler._entry_name(source, arch, "kernel.cu", defines) for source, arch, defines in variants}
        assert len(names) == len(variants)

    def test_the_order_of_macros_does_not_matter(self, tmp_path: Path, compiled: list[str]) -> None:
        cached_cubin(SCALE, "sm_90", defines={"FACTOR": 1, "OTHER": 2}, folder=tmp_path)
        cached_cubin(SCALE, "sm_90", defines={"OTHER": "2", "FACTOR": "1"}, folder=tmp_path)
        assert compiled == [SCALE]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: b"",
            lambda raw: raw[:5],
            lambda raw: raw[:40],
            lambda raw: raw[:-1],
            lambda raw: raw + b"\0",
            lambda raw: raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:],
            lambda raw: raw[:25] + bytes([raw[25] ^ 1]) + raw[26:],
            lambda raw: raw.replace(b"cubin 1\n", b"cubin 2\n", 1),
            lambda raw: raw[raw.index(b"\x7fELF") :],
            lambda raw: b"somebody else's file",
        ],
    )
    def test_a_torn_altered_or_foreign_file_is_made_again(
        self, tmp_path: Path, compiled: list[str], damage: Any
    ) -> None:
        right = cached_cubin(ADD, "sm_90", folder=tmp_path)
        (entry,) = tmp_path.iterdir()
        whole = entry.read_bytes()
        entry.write_bytes(damage(whole))
        assert cached_cubin(ADD, "sm_90", folder=tmp_path) == right
        assert compiled == [ADD, ADD]
        assert entry.read_bytes() == whole
        assert list(tmp_path.iterdir()) == [entry]

    def test_an_entry_of_another_compiler_is_made_again(
        self, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for version in ("12.9+12090", "13.0+12090", "13.0+13000", "13.0+13000"):
            monkeypatch.setattr(compiler, "_compiler_version", lambda version=version: version)
            cached_cubin(ADD, "sm_90", folder=tmp_path)
        assert len(compiled) == 3
        assert len(list(tmp_path.iterdir())) == 1

    def test_the_compilers_version_names_nvrtc_and_headers(self) -> None:
        assert re.fullmatch(r"\d+\.\d+\+\d{5}", compiler._compiler_version())

    def test_a_deployed_machine_needs_no_compiler(
        self, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
    ) -> None:
        right = cached_cubin(ADD, "sm_90", folder=tmp_path)
        request.getfixturevalue("without_nvrtc")
        assert cached_cubin(ADD, "sm_90", folder=tmp_path) == right
        with pytest.raises(BackendError, match=r"^NVRTC, CUDA's run-time compiler, was not found"):
            cached_cubin(ADD, "sm_89", folder=tmp_path)

    def test_a_folder_that_cannot_be_written_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "file").write_bytes(b"")
        assert cached_cubin(ADD, "sm_90", name="add.cu", folder=tmp_path / "file").startswith(b"\x7fELF")
        assert [record.message[:37] for record in caplog.records] == ["the compiled kernel add.cu is not kept"[:37]]

    def test_a_failed_write_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(compiler.os, "replace", full)
        assert cached_cubin(ADD, "sm_90", folder=tmp_path).startswith(b"\x7fELF")
        assert list(tmp_path.iterdir()) == []
        assert "No space left on device" in caplog.text

    def test_many_at_once(self, tmp_path: Path) -> None:
        start = threading.Barrier(4)
        found: list[bytes] = []

        def work() -> None:
            start.wait()
            found.append(cached_cubin(ADD, "sm_90", folder=tmp_path))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert len(set(found)) == 1
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({"WARPCACHE_CACHE": "/there", "XDG_CACHE_HOME": "/x"}, "/there"),
            ({"XDG_CACHE_HOME": "/x"}, "/x/warpcache"),
            ({}, str(Path.home() / ".cache" / "warpcache")),
        ],
    )
    @pytest.mark.skipif(sys.platform == "win32", reason="the user's cache folder is another one there")
    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
        for name in ("WARPCACHE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(cache_folder()) == expected

    def test_it_is_where_it_says(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WARPCACHE_CACHE", str(tmp_path))
        cached_cubin(ADD, "sm_90", name="add.cu")
        (entry,) = (tmp_path / "kernels").iterdir()
        assert entry.name.startswith("add.sm_90.")


def test_importing_the_kernels_loads_no_cuda() -> None:
    program = (
        "import sys\n"
        "import warpcache.kernels.image, warpcache.kernels.change, warpcache.kernels.warp, warpcache.kernels.compiler\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'cuda'])\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
