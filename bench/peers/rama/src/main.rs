//! Forward proxy on 127.0.0.1:PORT, for benches: requests in absolute form over pooled connections, and CONNECT.
//!
//! `peer-rama PORT [THREADS]`: one thread by default, to be pinned to a CPU. No log, as the others have none.

use std::{convert::Infallible, env, process};

use rama::{
    Layer, Service,
    http::{
        Request, Response, StatusCode,
        client::EasyHttpWebClient,
        layer::{
            remove_header::{RemoveRequestHeaderLayer, RemoveResponseHeaderLayer},
            upgrade::{EagerHttpProxyConnector, UpgradeLayer},
        },
        matcher::MethodMatcher,
        server::HttpServer,
        service::web::response::IntoResponse,
    },
    net::proxy::IoForwardService,
    rt::Executor,
    service::service_fn,
    tcp::{client::service::TcpConnector, server::TcpListener},
};

fn main() {
    let mut arguments = env::args().skip(1);
    let Some(port) = arguments.next().and_then(|text| text.parse::<u16>().ok()) else {
        eprintln!("usage: peer-rama PORT [THREADS]");
        process::exit(2);
    };
    let threads = arguments
        .next()
        .and_then(|text| text.parse::<usize>().ok())
        .unwrap_or(1);
    let runtime = if threads == 1 {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
    } else {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .build()
    };
    runtime.expect("a runtime").block_on(serve(port));
}

async fn serve(port: u16) {
    let executor = Executor::default();
    let client = EasyHttpWebClient::default_with_executor(executor.clone());
    let forward = service_fn(move |request: Request| {
        let client = client.clone();
        async move { Ok::<_, Infallible>(forwarded(&client, request).await) }
    });
    let service = (
        UpgradeLayer::new(
            executor.clone(),
            MethodMatcher::CONNECT,
            EagerHttpProxyConnector::new(
                TcpConnector::new(),
                IoForwardService::new(executor.clone()),
            ),
        ),
        RemoveResponseHeaderLayer::hop_by_hop(),
        RemoveRequestHeaderLayer::hop_by_hop(),
    )
        .into_layer(forward);
    let listener = TcpListener::bind_address(format!("127.0.0.1:{port}"), executor.clone())
        .await
        .expect("an address");
    listener
        .serve(HttpServer::auto(executor).service(service))
        .await;
}

async fn forwarded<C>(client: &C, request: Request) -> Response
where
    C: Service<Request, Output = Response>,
{
    client
        .serve(request)
        .await
        .unwrap_or_else(|_| StatusCode::BAD_GATEWAY.into_response())
}
