//! Finds free ports for servers that cannot choose one themselves.

use std::{
    io,
    net::{Ipv4Addr, TcpListener},
};

use crate::secrets;

/// Ports that are free now, below the range of outgoing connections, so that none of those takes one before its server does.
pub fn free_ports<const N: usize>() -> io::Result<[u16; N]> {
    // Held until all are found, so that they differ.
    let mut held = Vec::new();
    for _ in 0..200 {
        if held.len() == N {
            break;
        }
        let port = 20_000 + u16::from_ne_bytes(secrets::random()?) % 12_000;
        held.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map(|listener| (port, listener)));
    }
    let ports: Vec<u16> = held.into_iter().map(|(port, _)| port).collect();
    ports.try_into().map_err(|_| io::Error::other("too few free ports between 20000 and 32000 on 127.0.0.1"))
}

pub fn free_port() -> u16 {
    let [port] = free_ports().expect("a free port");
    port
}
