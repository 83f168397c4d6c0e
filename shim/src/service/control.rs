//! The node CLI's service: see [`crate::control`]. Answered from the host, as status is.

use std::collections::HashMap;

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Result as TtrpcResult};
use prost::Message as _;

use super::{response, serve};
use crate::control::{REPORT, SERVICE};
use crate::sandbox::SandboxHandle;

/// The service under its name.
pub fn services(sandbox: SandboxHandle, sandbox_id: &str) -> HashMap<String, Service> {
    let report =
        Box::new(Report { sandbox, sandbox_id: sandbox_id.to_owned() }) as Box<dyn MethodHandler + Send + Sync>;
    let methods = HashMap::from([(REPORT.to_owned(), report)]);
    HashMap::from([(SERVICE.to_owned(), Service { methods, streams: HashMap::new() })])
}

struct Report {
    sandbox: SandboxHandle,
    sandbox_id: String,
}

#[async_trait]
impl MethodHandler for Report {
    async fn handler(&self, _: TtrpcContext, _: ttrpc::Request) -> TtrpcResult<ttrpc::Response> {
        let report = serve(REPORT, &self.sandbox_id, "", self.sandbox.report()).await;
        Ok(response(report.map(|report| report.encode_to_vec())))
    }
}
