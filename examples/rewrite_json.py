"""Opens TLS, rewrites JSON on its way, and saves what passed as HAR, which browsers' tools read::

rama-ebpf ca create --cert ca.pem --key ca.key
rama-ebpf run rewrite_json:proxy --sandbox-write .    # where the workers' user may write
"""

from pathlib import Path

from rama_ebpf.core import stack
from rama_ebpf.process import Application, WorkerContext
from rama_ebpf.services import HttpInspector, Socks5Server
from rama_ebpf.services.http.layers import DecodeLayer, HarLayer, HarRecorder, Json, JsonLayer
from rama_ebpf.services.tls import CertificateAuthority, LeafIssuer, TlsInterceptor, TlsTunnelLayer


def without_ads(_request: object, value: Json) -> Json:
    return {name: part for name, part in value.items() if name != "ads"} if isinstance(value, dict) else value


def proxy(context: WorkerContext) -> Application:
    recorder = HarRecorder(save_to=Path(f"traffic-{context.worker}.har").absolute())
    inspect = HttpInspector([HarLayer(recorder), JsonLayer(response=without_ads), DecodeLayer()])
    issuer = LeafIssuer(CertificateAuthority.load(Path("ca.pem"), Path("ca.key")))
    intercept = TlsInterceptor(issuer, inspect=inspect)
    service = stack(TlsTunnelLayer(intercept=intercept), Socks5Server(context.connector()))
    return Application(dict.fromkeys(context.listeners, service), close=recorder.save)
