import Glibc
import Host

/// Fills an SSL_CTX from a folder of certificates.
///
/// SAFETY: `context` is the caller's for the life of this value.
@safe struct CertificateLoader {
    private let ssl: LibSSL
    private let crypto: LibCrypto
    private let context: OpaquePointer
    private let folder: String
    /// The object, for sentences: `tls-creds-x509 tls0`.
    private let subject: String

    init(ssl: LibSSL, crypto: LibCrypto, context: OpaquePointer, folder: String, subject: String) {
        self.ssl = ssl
        self.crypto = crypto
        unsafe self.context = unsafe context
        self.folder = folder
        self.subject = subject
    }

    func load(_ endpoint: TLSCredentials.Endpoint, checksSanity: Bool) throws(TLSError) {
        crypto.clear()
        let authority = try file("ca-cert.pem")
        guard unsafe ssl.loadVerifyFile(context, authority) == 1 else { throw failure(authority, "certificates") }
        try loadRevocations()
        let certificate = "\(folder)/\(endpoint.rawValue)-cert.pem"
        let key = "\(folder)/\(endpoint.rawValue)-key.pem"
        // A client without a certificate is for a server that demands none.
        if endpoint == .client, !exists(certificate), !exists(key) { return }
        _ = try file("\(endpoint.rawValue)-cert.pem")
        _ = try file("\(endpoint.rawValue)-key.pem")
        guard unsafe ssl.useCertificateChainFile(context, certificate) == 1 else {
            throw failure(certificate, "a certificate")
        }
        guard unsafe ssl.usePrivateKeyFile(context, key, OpenSSL.filePEM) == 1 else {
            throw failure(key, "a private key without a password")
        }
        guard unsafe ssl.checkPrivateKey(context) == 1 else {
            throw failure(key, "the key of \(certificate)")
        }
        if checksSanity { try checkOwn(certificate, endpoint) }
    }

    /// Only peers' own certificates are looked up: the authority's list says nothing of itself.
    private func loadRevocations() throws(TLSError) {
        let path = "\(folder)/ca-crl.pem"
        guard exists(path) else { return }
        let store = unsafe ssl.certificateStore(context)
        guard unsafe crypto.loadStoreFile(store, path) == 1 else { throw failure(path, "a revocation list") }
        unsafe _ = crypto.setStoreFlags(store, OpenSSL.checkRevocation)
    }

    /// Whether the peer would accept what we show, as far as our own files tell.
    private func checkOwn(_ path: String, _ endpoint: TLSCredentials.Endpoint) throws(TLSError) {
        guard let check = unsafe crypto.newVerification() else { throw failure(path, "a certificate") }
        defer { unsafe crypto.freeVerification(check) }
        let store = unsafe ssl.certificateStore(context)
        let own = unsafe ssl.certificate(context)
        let purpose = endpoint == .server ? "ssl_server" : "ssl_client"
        guard unsafe crypto.startVerification(check, store, own, nil) == 1,
            unsafe crypto.setVerificationPurpose(check, purpose) == 1
        else { throw failure(path, "a certificate") }
        guard unsafe crypto.verify(check) != 1 else { return }
        let code = unsafe Int(crypto.verificationError(check))
        throw TLSError(
            "\(subject): \(path): \(TLSFailure.ofOwnCertificate(code, crypto)); correct that, or see what peers say of it (sanity-check=no)"
        )
    }

    private func exists(_ path: String) -> Bool { unsafe access(path, F_OK) == 0 }

    private func file(_ name: String) throws(TLSError) -> String {
        let path = "\(folder)/\(name)"
        guard unsafe access(path, R_OK) == 0 else {
            throw TLSError(
                "\(subject): open \(path): \(SystemError.text(of: errno)); the folder needs QEMU's file names (Documentation/tls.md)"
            )
        }
        return path
    }

    private func failure(_ path: String, _ wanted: String) -> TLSError {
        let words = crypto.takeErrors().first.map { " (OpenSSL: \(crypto.words(for: $0)))" } ?? ""
        return TLSError("\(subject): \(path) is not \(wanted), in PEM form\(words)")
    }
}
