# launch70b beside a CUDA driver. Build and run (docs/host.md says why so):
#   docker build --tag launch70b .
#   docker run --rm --gpus all --shm-size 1g --ulimit memlock=-1 --volume launch70b:/cache launch70b gpus=2
# Of CUDA only the runtime's base: torch's wheels bring all other libraries, of this version for torch 2.13.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

# A number, so that a cluster can see that it is not root. 1000 is Ubuntu's own user.
RUN useradd --create-home --uid 10001 launch70b \
 && mkdir /work /cache \
 && chown launch70b /work /cache

COPY . /source
# DeepSpeed's ops are not compiled: the parts used here are plain Python.
RUN python3 -m venv /opt/launch70b \
 && DS_BUILD_OPS=0 /opt/launch70b/bin/pip install --no-cache-dir --constraint /source/constraints.txt "/source[slurm]" \
 && rm -rf /source

# Models and measured rates outlast the container where /cache is a volume; runs go to /work.
ENV PATH=/opt/launch70b/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
USER 10001
WORKDIR /work
# Whether cards are there, and a driver that is new enough; a run itself ends with an exit code.
HEALTHCHECK --interval=60s --timeout=20s --start-period=10s CMD ["python", "-m", "tools.health"]
# Python ends a run in order at `docker stop`; that takes seconds.
ENTRYPOINT ["python", "-m", "launcher"]
CMD ["--help"]
