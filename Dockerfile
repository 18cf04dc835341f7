# docker build -t fastar-serve .
# docker run --gpus all --shm-size 1g -p 8000-8002:8000-8002 fastar-serve     (frames travel through /dev/shm)
ARG TRITON=26.04

FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3 AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY fastar_backend fastar_backend
# An environment of its own: the container's packages stay as they are, and its Triton is the server, not pytriton's.
# The model process takes the first python3 on PATH for its home; `fastar serve` sees to it that this is the one.
RUN python3 -m pip install virtualenv==21.15.8 \
 && python3 -m virtualenv /opt/fastar/venv \
 && /opt/fastar/venv/bin/pip install -c constraints.txt ".[redis,wan]" "tritonclient[grpc]"

FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3
COPY --from=build /opt/fastar/venv /opt/fastar/venv
COPY model_repository /opt/fastar/model_repository
ENV PATH=/opt/fastar/venv/bin:/opt/tritonserver/bin:${PATH} \
    FASTAR_MODEL_REPOSITORY=/opt/fastar/model_repository \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 1000:1000
EXPOSE 8000 8001 8002
# Loading and warming up count as start. A model process that dies later is `fastar serve`'s to find and replace.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=3)"]
ENTRYPOINT ["fastar", "serve", "--host", "0.0.0.0"]
