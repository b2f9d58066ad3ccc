//! `serve-search`: an index behind Search-R1's protocol.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use mempo_run::{Input, ResultExt, check_interrupt};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Asked, PATH, hits_value};
use crate::retriever::{Retriever, RetrieverOptions};

/// Longest body of a request.
const BODY_BYTES: usize = 8 << 20;
/// Most queries of a request.
const MOST_QUERIES: usize = 4096;
/// Most documents a query.
const MOST_DOCUMENTS: usize = 1000;
/// An answer is not made longer than by one query's documents past this.
const ANSWER_BYTES: usize = 64 << 20;
/// Requests at work at a time; the others wait.
const REQUESTS: usize = 64;
/// Queries looked for in one pass over vectors.
const TOGETHER: usize = 32;
/// Connections at a time; further ones wait to be accepted.
const CONNECTIONS: usize = 1024;
/// How long a request's head may take, and how long a connection may be idle.
const HEAD: Duration = Duration::from_mins(1);
/// How long a request may take from its head to the answer, and how long what is under way at the end.
const REQUEST: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(50);

/// Serve a search index to other programs, by the protocol of Search-R1.
///
/// POST /retrieve takes {"queries": [...], "topk": 3, "return_scores": true}; `sample --search URL`, Search-R1, MEM1 and verl
/// ask so. GET /health tells which index it is. Runs until a signal comes; what is under way is then answered first.
#[derive(Debug, Args)]
pub(crate) struct ServeSearchArguments {
    /// Search index, as `index` writes it
    #[arg(long, value_name = "DIR")]
    index: PathBuf,
    /// Address to listen on; 0.0.0.0 lets other machines in
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one, which the log names
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Documents a query brings if the client does not say how many
    #[arg(long, value_name = "N", default_value = "3")]
    top_k: NonZeroUsize,
    #[command(flatten)]
    retriever: RetrieverOptions,
}

/// Runs `serve-search`.
pub(crate) fn run(arguments: &ServeSearchArguments) -> anyhow::Result<()> {
    let input = Input::stage("index", &arguments.index)?;
    let encoder = arguments.retriever.input()?;
    let index = arguments.retriever.open(&input, encoder.as_ref())?;
    let address = SocketAddr::new(arguments.host, arguments.port);
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address}: choose another --host or --port"))
        .usage()?;
    let served = Served { index, digest: input.digest().to_owned(), top_k: arguments.top_k.get() };
    let (count, local) = (served.index.len(), listener.local_addr()?);
    tracing::info!("{count} documents are searched at http://{local}{PATH}");
    serve(listener, served, &|| check_interrupt().is_err())?;
    check_interrupt()
}

/// What is served.
pub(crate) struct Served {
    pub(crate) index: Retriever,
    /// The index's, for whoever wants to know which it is.
    pub(crate) digest: String,
    /// Documents a query unless the client says how many.
    pub(crate) top_k: usize,
}

/// Answers requests until `stopped` says so, and what is under way then.
pub(crate) fn serve(listener: TcpListener, served: Served, stopped: &dyn Fn() -> bool) -> anyhow::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(threads).max_blocking_threads(threads).enable_all().build()?;
    listener.set_nonblocking(true)?;
    let handler = Arc::new(Handler { served: Arc::new(served), requests: Semaphore::new(REQUESTS) });
    let result = runtime.block_on(accept(listener, handler, stopped));
    // A search that is too late for its own request is not waited for.
    runtime.shutdown_timeout(TICK);
    result
}

async fn accept(listener: TcpListener, handler: Arc<Handler>, stopped: &dyn Fn() -> bool) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (connections, under_way) = (Arc::new(Semaphore::new(CONNECTIONS)), GracefulShutdown::new());
    while !stopped() {
        // What is not accepted within a tick is left for the next one; nothing is lost by giving up the wait.
        let next = async {
            let permit = Arc::clone(&connections).acquire_owned().await?;
            Ok::<_, anyhow::Error>((permit, listener.accept().await?))
        };
        let (permit, (stream, _)) = match timeout(TICK, next).await {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(error)) => {
                // Out of files, or a connection that was gone at once.
                tracing::warn!("a connection is not accepted: {error}");
                tokio::time::sleep(TICK).await;
                continue;
            }
            Err(_) => continue,
        };
        let handler = Arc::clone(&handler);
        let service = service_fn(move |request| {
            let handler = Arc::clone(&handler);
            async move { Ok::<_, Infallible>(handler.respond(request).await) }
        });
        let mut connection = hyper::server::conn::http1::Builder::new();
        connection.timer(TokioTimer::new()).header_read_timeout(HEAD);
        let connection = under_way.watch(connection.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection ended: {error}");
            }
            drop(permit);
        });
    }
    drop(listener);
    if timeout(REQUEST, under_way.shutdown()).await.is_err() {
        tracing::warn!("some requests were left unanswered after {REQUEST:?}");
    }
    Ok(())
}

/// A status other than 200, and what the client is told.
struct Refusal(StatusCode, String);

fn refuse<T>(status: StatusCode, detail: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(status, detail.into()))
}

/// Answers one request after another.
struct Handler {
    served: Arc<Served>,
    /// Permits of requests at work.
    requests: Semaphore,
}

impl Handler {
    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let deadline = Instant::now() + REQUEST;
        let answer = timeout(REQUEST, self.answer(request, deadline)).await;
        let answer = answer.unwrap_or_else(|_| {
            refuse(StatusCode::SERVICE_UNAVAILABLE, format!("not answered within {REQUEST:?}: ask less, or later"))
        });
        let (status, body) = match answer {
            Ok(body) => (StatusCode::OK, body),
            Err(Refusal(status, detail)) => (status, json!({ "detail": detail }).to_string().into()),
        };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match status {
            StatusCode::SERVICE_UNAVAILABLE => drop(headers.insert(RETRY_AFTER, HeaderValue::from_static("1"))),
            StatusCode::METHOD_NOT_ALLOWED => drop(headers.insert(ALLOW, HeaderValue::from_static("GET, POST"))),
            _ => {}
        }
        response
    }

    async fn answer(&self, request: Request<Incoming>, deadline: Instant) -> Result<Bytes, Refusal> {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/health") => Ok(self.served.health().to_string().into()),
            (&Method::POST, PATH) => {
                let closed = |_| Refusal(StatusCode::SERVICE_UNAVAILABLE, "the server is closing".to_owned());
                let _permit = self.requests.acquire().await.map_err(closed)?;
                let asked = parse(&body(request.into_body()).await?)?;
                let served = Arc::clone(&self.served);
                let searched = tokio::task::spawn_blocking(move || served.retrieve(&asked, deadline)).await;
                searched.unwrap_or_else(|_| refuse(StatusCode::INTERNAL_SERVER_ERROR, "the search panicked"))
            }
            (_, PATH) => refuse(StatusCode::METHOD_NOT_ALLOWED, format!("{PATH} takes POST")),
            (_, "/health") => refuse(StatusCode::METHOD_NOT_ALLOWED, "/health takes GET"),
            _ => refuse(StatusCode::NOT_FOUND, format!("there are POST {PATH} and GET /health")),
        }
    }
}

/// A request's whole body.
async fn body(body: Incoming) -> Result<Bytes, Refusal> {
    match Limited::new(body, BODY_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => refuse(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body has more than {BODY_BYTES} bytes: send fewer queries"),
        ),
        Err(error) => refuse(StatusCode::BAD_REQUEST, format!("the body can't be read: {error}")),
    }
}

fn parse(body: &[u8]) -> Result<Asked, Refusal> {
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| Refusal(StatusCode::BAD_REQUEST, format!("the body is not JSON: {error}")))?;
    let asked: Asked = serde_json::from_value(value).map_err(|error| {
        let expected = r#"expected {"queries": [text, ...], "topk": number or null, "return_scores": true or false}"#;
        Refusal(StatusCode::UNPROCESSABLE_ENTITY, format!("{error}: {expected}"))
    })?;
    let (queries, topk) = (asked.queries.len(), asked.topk.unwrap_or_default());
    if queries > MOST_QUERIES {
        return refuse(
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("{queries} queries, at most {MOST_QUERIES} are taken"),
        );
    }
    if topk > MOST_DOCUMENTS {
        return refuse(StatusCode::UNPROCESSABLE_ENTITY, format!("topk is {topk}, at most {MOST_DOCUMENTS} is given"));
    }
    Ok(asked)
}

impl Served {
    fn health(&self) -> Value {
        json!({"status": "ok", "documents": self.index.len(), "index": self.digest, "top_k": self.top_k})
    }

    /// The answer to a request, as JSON.
    fn retrieve(&self, asked: &Asked, deadline: Instant) -> Result<Bytes, Refusal> {
        let top_k = asked.topk.filter(|topk| *topk > 0).unwrap_or(self.top_k);
        let mut result = String::from("{\"result\":[");
        // By vectors, queries of one pass are found faster than one after the other.
        let together = if self.index.is_dense() { TOGETHER } else { 1 };
        let mut place = 0;
        for queries in asked.queries.chunks(together) {
            if Instant::now() >= deadline {
                return refuse(
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("{place} queries took {REQUEST:?}: ask fewer at once"),
                );
            }
            let found = self.index.search(queries, top_k).map_err(|error| {
                tracing::error!("{error:#}");
                Refusal(StatusCode::INTERNAL_SERVER_ERROR, "the index can't be read".to_owned())
            })?;
            for hits in found {
                if result.len() > ANSWER_BYTES {
                    let told = format!(
                        "{place} queries already fill {ANSWER_BYTES} bytes: ask fewer at once, or for fewer documents"
                    );
                    return refuse(StatusCode::UNPROCESSABLE_ENTITY, told);
                }
                result.push_str(if place == 0 { "" } else { "," });
                result.push_str(&hits_value(hits, asked.return_scores.unwrap_or_default()).to_string());
                place += 1;
            }
        }
        Ok((result + "]}").into())
    }
}

#[cfg(test)]
mod tests;
