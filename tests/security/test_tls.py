"""TLS where it is configured: no face talks to who does not speak it, or lacks a certificate that it asks for."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from router_fakes import FakeCluster
from served_worker import ServedPrefill

from duopool.client import AsyncClient, ServerUnavailable
from duopool.core.config import InternalConfig, TlsFiles
from duopool.core.messages import DescribeSource
from duopool.proto import codec
from duopool.proto.client_access import ClientAccess
from duopool.proto.internal_access import TLS_NAME, InternalAccess


def files(authority: trustme.CA, folder: Path, *names: str) -> TlsFiles:
    folder.mkdir()
    issued = authority.issue_cert(*names)
    issued.private_key_pem.write_to_path(folder / "key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return TlsFiles(certificate=str(folder / "certificate.pem"), key=str(folder / "key.pem"), ca=str(folder / "ca.pem"))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def test_internal_tls_is_mutual(authority: trustme.CA, tmp_path: Path) -> None:
    credential = {"DUOPOOL_CREDENTIAL": "the cluster's credential"}
    tls = files(authority, tmp_path / "own", TLS_NAME)
    access = InternalAccess.load(InternalConfig(tls=tls), credential)
    stranger = files(trustme.CA(), tmp_path / "stranger", TLS_NAME)
    other = InternalAccess.load(InternalConfig(tls=stranger), credential)
    plain = InternalAccess.load(InternalConfig(), credential)
    worker = ServedPrefill(access)
    try:

        def describe(channel: grpc.Channel) -> grpc.StatusCode:
            with channel:
                call = channel.unary_unary(codec.DESCRIBE_METHOD)
                request = codec.encode(DescribeSource(transport="grpc"))
                try:
                    call(request, metadata=access.metadata, timeout=20)
                except grpc.RpcError as error:
                    return error.code()
                return grpc.StatusCode.OK

        assert describe(access.channel(worker.address)) is grpc.StatusCode.OK
        assert describe(plain.channel(worker.address)) is grpc.StatusCode.UNAVAILABLE
        assert describe(other.channel(worker.address)) is grpc.StatusCode.UNAVAILABLE
        # The right authority, but no certificate of one's own.
        options = (("grpc.ssl_target_name_override", TLS_NAME),)
        nameless = grpc.ssl_channel_credentials(root_certificates=Path(tls.ca or "").read_bytes())
        channel = grpc.secure_channel(worker.address, nameless, options=options)
        assert describe(channel) is grpc.StatusCode.UNAVAILABLE
    finally:
        worker.stop()
    with pytest.raises(ValueError, match="mutual"):
        InternalConfig(tls=TlsFiles(certificate="a", key="b"))


@pytest.mark.parametrize("is_mutual", [False, True], ids=["one-way", "mutual"])
def test_public_tls_covers_both_faces(authority: trustme.CA, tmp_path: Path, is_mutual: bool) -> None:
    server = files(authority, tmp_path / "server", "127.0.0.1")
    client = files(authority, tmp_path / "client", "client.example")
    ca, ours = str(server.ca), server if is_mutual else server.model_copy(update={"ca": None})
    right = ClientAccess(tls_ca=ca, tls_certificate=client.certificate, tls_key=client.key)
    nameless = ClientAccess(tls_ca=ca)

    async def models(cluster: FakeCluster, access: ClientAccess) -> str:
        async with AsyncClient(cluster.address, access=access) as caller:
            return (await caller.models())[0].id

    async def http_models(cluster: FakeCluster, context: ssl.SSLContext) -> int:
        async with httpx.AsyncClient(verify=context) as caller:
            return (await caller.get(f"https://127.0.0.1:{cluster.router.http_port}/v1/models")).status_code

    async def run() -> None:
        async with FakeCluster(tls=ours, http_port=0) as cluster:
            context = ssl.create_default_context(cafile=ca)
            assert await models(cluster, right) == "tiny"
            if is_mutual:
                with pytest.raises(ServerUnavailable):
                    await models(cluster, nameless)
                with pytest.raises(httpx.TransportError):
                    await http_models(cluster, context)
            else:
                assert await models(cluster, nameless) == "tiny"
                assert await http_models(cluster, context) == 200
            context.load_cert_chain(client.certificate, client.key)
            assert await http_models(cluster, context) == 200
            with pytest.raises(ServerUnavailable):
                await models(cluster, ClientAccess())
            async with httpx.AsyncClient() as caller:
                with pytest.raises(httpx.TransportError):
                    await caller.get(f"http://127.0.0.1:{cluster.router.http_port}/v1/models")

    asyncio.run(run())
