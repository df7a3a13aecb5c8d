/// What two sides of a test's migration show each other.
public enum TLSKind: String, CaseIterable, Sendable {
    case x509, psk

    /// Whether they can be made here.
    public var canBeMade: Bool { self == .psk || CertificateAuthority.isInstalled }

    /// The option that has a VM know them as `tls0`. - Parameter option: a QEMU writes it with one dash.
    public func object(_ folder: String, _ endpoint: String, by option: String = "--object") -> [String] {
        [option, "tls-creds-\(rawValue),id=tls0,dir=\(folder),endpoint=\(endpoint)"]
    }
}

extension Workbench {
    /// Keys, or certificates of both sides: of `source` and `destination`. - Returns: the folder where they lie.
    public func makeCredentials(_ kind: TLSKind) throws -> String {
        let folder = "\(self.folder)/\(kind.rawValue)"
        switch kind {
        case .x509:
            let authority = try CertificateAuthority("Authority", in: "\(self.folder)/authority")
            try authority.issue(.server, to: folder, name: "destination")
            try authority.issue(.client, to: folder, name: "source")
        case .psk:
            try CertificateAuthority.writeKeys(
                ["qemu": "9f5e4d3c2b1a00112233445566778899aabbccddeeff00112233445566778899"], to: folder)
        }
        return folder
    }
}
